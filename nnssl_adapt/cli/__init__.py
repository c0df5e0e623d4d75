"""The command line: parse, one public call, print. Nothing imports this room."""
