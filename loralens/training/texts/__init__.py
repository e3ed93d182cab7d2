"""Texts and dialogues for training: as tokens, as rows of several texts, and as the batches of a task."""
