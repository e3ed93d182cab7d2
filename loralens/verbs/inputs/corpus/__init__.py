"""Texts, labelled texts and dialogues as inputs of a verb, and how they fill the rows of a run."""
