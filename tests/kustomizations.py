"""The manifests of a project, rendered: overlays, combinations of components, and both."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any

import yaml

from tests.containers import Containers

RELEASES = ["canary", "blue-green", "rollouts"]
AUTOSCALERS = ["autoscale-hpa", "autoscale-keda"]
CHOICES = [
    # In the order in which their pages ask to be listed; of each line at most one.
    RELEASES,
    ["gpu"],
    ["redis", "redis-external"],
    ["monitoring"],
    AUTOSCALERS,
    ["model-volume", "model-image"],
]
LAST = "rollouts-autoscaled"
IN_EACH_COMBINATION = {"namespace"}
ADDED = {"redis-external"}
"""What is added to an overlay only: it changes nothing that others bring."""

Object = dict[str, Any]
Rendered = dict[str, list[Object]]
"""The objects, by the overlay or the components that they are rendered of."""


def combinations() -> Iterator[list[str]]:
    combined = [[name for name in names if name not in ADDED] for names in CHOICES]
    for choice in product(*([None, *names] for names in combined)):
        names = [name for name in choice if name]
        if "blue-green" in names and {*AUTOSCALERS} & {*names}:
            # Its page says to choose.
            continue
        yield with_last(names)


def with_last(names: list[str]) -> list[str]:
    is_autoscaled = "rollouts" in names and {*AUTOSCALERS} & {*names}
    return [*names, LAST] if is_autoscaled else names


def with_component(components: list[str], added: str) -> list[str]:
    """What a reader of its page makes of an overlay's list."""
    [row] = [names for names in CHOICES if added in names]
    others = {*row, *(AUTOSCALERS if added == "blue-green" else ())}
    kept = [name for name in components if name not in others]
    order = list(chain(IN_EACH_COMBINATION, *CHOICES))
    return with_last(sorted([*kept, added], key=order.index))


def kustomization(components: list[str], base: Object) -> Object:
    return base | {"components": [f"../../components/{name}" for name in components]}


def render(containers: Containers, folder: Path) -> Rendered:
    """All that can be made of `folder`, which is a project's deploy/kubernetes."""
    overlays = {path.name: path for path in (folder / "overlays").iterdir()}
    pages = {
        name: yaml.safe_load((path / "kustomization.yaml").read_text())
        for name, path in overlays.items()
    }
    listed = {
        name: [path.rpartition("/")[2] for path in page["components"]]
        for name, page in pages.items()
    }
    own = {"components", "patches"}
    plain = {key: value for key, value in pages["production"].items() if key not in own}
    made = {"+".join(names) or "base": kustomization(names, plain) for names in combinations()}
    for (name, page), added in product(pages.items(), chain(*CHOICES)):
        if added not in listed[name]:
            components = with_component(listed[name], added)
            made[f"{name}-with-{added}"] = kustomization(components, page)
    for name, page in made.items():
        overlays[name] = folder / "combinations" / name
        overlays[name].mkdir(parents=True)
        (overlays[name] / "kustomization.yaml").write_text(yaml.safe_dump(page))
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda path: containers.kubectl("kustomize", path), overlays.values())
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return {
            name: list(yaml.load_all(text, loader))
            for name, text in zip(overlays, texts, strict=True)
        }


def distinct(rendered: Rendered) -> list[Object]:
    """Each object once, however many combinations have it."""
    objects = chain.from_iterable(rendered.values())
    return list({json.dumps(entry, sort_keys=True): entry for entry in objects}.values())
