"""Time policies of several sizes: decisions, updates, frozen backbones."""
