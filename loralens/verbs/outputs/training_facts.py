"""What the metadata of an adapter say about its training, as rows of a table of facts."""

from loralens.core.adapter import Adapter
from loralens.formats.records.training_notes import Folder, TrainingNotes
from loralens.tables.numbers import count

TAGS_NAMED = 12  # tags of captions, and folders of images, that are listed
TAGS_IN_ROW = 3


def training_facts(notes: TrainingNotes | None) -> list[tuple[str, str]]:
    """What the metadata say about the training, one property a row."""
    if notes is None:
        return []
    words = [("trigger words", ", ".join(notes.trigger_words))] if notes.trigger_words else []
    facts = [*words, *((name.replace("_", " "), value) for name, value in notes.values.items())]
    if notes.folders:
        facts.append(("folders", "; ".join(map(_folder_text, notes.folders[:TAGS_NAMED]))))
    listed = [f"{tag.tag} ({tag.images})" for tag in notes.tags[:TAGS_NAMED]]
    if notes.tag_count > TAGS_NAMED:
        listed.append(f"and {notes.tag_count - TAGS_NAMED:,} more")
    # A few on each row, so that none is shortened on a narrow terminal.
    rows = [", ".join(listed[i : i + TAGS_IN_ROW]) for i in range(0, len(listed), TAGS_IN_ROW)]
    return facts + [("" if i else "tags", row) for i, row in enumerate(rows)]


def _folder_text(folder: Folder) -> str:
    images = "" if folder.images is None else f": {count(folder.images, 'image')}"
    return folder.name + images + (f" × {folder.repeats}" if images and folder.repeats else "")


def base_by_shapes(adapter: Adapter) -> str:
    """The base of an adapter that does not name it, in the conclusion: the image models that have its modules."""
    # Imported here, since most adapters name their base.
    from loralens.core.naming.base_model import image_models_of
    from loralens.core.naming.image_models import image_models

    models = image_models_of(adapter)
    if not models:
        return "a base that it does not name"
    stated = (adapter.metadata or {}).get("ss_base_model_version", "")
    named = [model for model in image_models() if any(word in stated.lower() for word in model.words)]
    # Some trainers write a version that they copied from a template.
    wrong = f", although its metadata say {stated}" if named and not any(model in models for model in named) else ""
    return f"{' or '.join(model.name for model in models)}, by the names and shapes of its modules{wrong}"
