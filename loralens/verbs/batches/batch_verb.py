"""A verb for one adapter as a verb for several: a list, or a folder that has adapters in it.

Every call of such a verb imports this module, and most calls have one adapter. What works on several is imported where
there are some.
"""

from collections.abc import Callable
from functools import partial, wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loralens.verbs.batches.several import WORK, is_several
from loralens.verbs.inputs.adapters import Source

if TYPE_CHECKING:
    from loralens.verbs.batches.batch_task import AdapterWork

F = TypeVar("F", bound=Callable[..., Any])


def in_batches(work: "Callable[[Callable[..., Any]], AdapterWork]") -> Callable[[F], F]:
    """Let a verb that writes one adapter take several too, and then return a `BatchResult`.

    Parameters
    ----------
    work : callable
        The verb for one adapter → its work. It is called when there are several adapters.
    """

    def decorate(verb: F) -> F:
        name, parameters = verb.__name__, signature(verb).parameters
        first = next(iter(parameters))
        catch_all = [parameter.name for parameter in parameters.values() if parameter.kind is Parameter.VAR_KEYWORD]
        WORK[name] = partial(work, verb)

        @wraps(verb)
        def for_several(*arguments: Any, **keywords: Any) -> Any:
            source = arguments[0] if arguments else keywords.get(first)
            if not is_several(cast("Source", source)):
                return verb(*arguments, **keywords)
            # Imported here, as it takes 8 ms.
            from loralens.verbs.batches.batch import adapter_target, run_batch

            options = signature(verb).bind(*arguments, **keywords).arguments
            # The options of a TypedDict are bound as one mapping.
            for keyword in catch_all:
                options |= options.pop(keyword, {})
            adapters = options.pop(first)
            chosen = adapters if isinstance(adapters, list | tuple) else [adapters]
            return run_batch(name, chosen, adapter_target(options), options)

        return cast("F", for_several)

    return decorate
