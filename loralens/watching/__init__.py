"""Watching adapters while any trainer trains them: live views, snapshots, warnings, and exact merging."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.formats.records.training import read_watch_log as read_watch_log
    from loralens.watching.live_switchboard import LiveSwitchboard as LiveSwitchboard
    from loralens.watching.snapshots import WARNINGS as WARNINGS
    from loralens.watching.snapshots import HealthWarning as HealthWarning
    from loralens.watching.trainer_callback import ExactMergeCallback as ExactMergeCallback
    from loralens.watching.trainer_callback import SpectralCallback as SpectralCallback
    from loralens.watching.view import live as live
    from loralens.watching.watcher import Snapshot as Snapshot
    from loralens.watching.watcher import Watcher as Watcher
    from loralens.watching.watcher import WatcherOptions as WatcherOptions
    from loralens.watching.watcher import lightning_callback as lightning_callback
else:
    # Imported on first use, since torch takes a second to import. No trainer is imported until its callback is used.
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
