"""The methods, one module each, on shelves; the folder is the registry."""
