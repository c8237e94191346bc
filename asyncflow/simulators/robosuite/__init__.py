"""robosuite behind robomimic."""
