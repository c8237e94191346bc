"""Policies that LeRobot trained."""
