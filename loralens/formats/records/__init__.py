"""Files that loralens keeps beside adapters and models: undo files, moments, recipes, caches, training runs."""
