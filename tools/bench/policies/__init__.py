"""What policies of several sizes cost: decisions, updates, frozen backbones."""
