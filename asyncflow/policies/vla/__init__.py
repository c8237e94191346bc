"""Vision-language-action policies: our own, and models from elsewhere."""
