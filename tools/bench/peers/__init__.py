"""asyncflow beside other libraries: the time of an update, and of whole runs."""
