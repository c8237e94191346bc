"""Configuration, tasks and other programs' files: everything that is answered before torch is loaded."""
