"""Other people's libraries: each is imported inside the functions that use it, and a missing one says what to install."""
