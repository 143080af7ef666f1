"""The local page: every run on this machine, read only, without a script and without anything from outside."""
