"""LIBERO, which runs on robosuite 1.4 in an interpreter of its own."""
