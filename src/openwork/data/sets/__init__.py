"""The named sets, one file a set or a family; a file adds its sets by a tuple `ENTRIES`."""
