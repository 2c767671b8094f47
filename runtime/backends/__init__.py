"""Where graphs run: session.py is the contract, every other file a backend or a part of one."""
