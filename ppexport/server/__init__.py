"""``ppexport serve``: a bundle behind OpenAI's API. protocol.py is what is asked and answered, loop.py runs it."""
