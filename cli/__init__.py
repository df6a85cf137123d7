"""The command line: parse, call localrun, print. One command a file."""
