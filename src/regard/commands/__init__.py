"""The commands, a file each: the only code that prints, and the only code that knows a flag."""
