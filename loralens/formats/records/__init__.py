"""Files beside adapters and models: undo files, certificates, moments, recipes, caches, training runs."""
