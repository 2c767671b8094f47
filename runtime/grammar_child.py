"""Tries a JSON schema out in a process of its own: what llguidance makes of one may take any time and memory, or crash.

Run as a file, so that nothing but llguidance is loaded. On standard input a line of JSON, the paths to import from and
the options of the grammar, and the schema behind it. Ends with 0, or with PROBLEM and what is wrong with the schema.
"""

import contextlib
import json
import sys

MEMORY = 1 << 30  # bytes
PROBLEM = 3  # exit code; any other is that of a crash


def main() -> None:
    """Try one schema."""
    sys.path[:], options = json.loads(sys.stdin.readline())
    schema = sys.stdin.read()
    import llguidance

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        rules = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), rules, log_level=0)
        matcher.compute_bitmask()
        problem = matcher.get_error() if matcher.is_error() else ""
    except ValueError as err:
        problem = str(err) or "it is no schema"
    if problem:
        sys.stdout.write(problem)
        sys.exit(PROBLEM)


if __name__ == "__main__":
    main()
