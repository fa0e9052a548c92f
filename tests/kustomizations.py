"""The manifests of a project, rendered: each overlay, and each combination of components."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any

import yaml

from tests.containers import Containers

CHOICES = [
    # In the order in which their pages ask to be listed; of each line at most one.
    ["canary", "blue-green"],
    ["gpu"],
    ["redis"],
    ["monitoring"],
    ["autoscale-hpa", "autoscale-keda"],
    ["model-volume", "model-image"],
    ["rollouts"],
]
COMBINATION = """
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: image-test
resources: [../../base]
components: {components}
images: [{{name: service, newName: registry.example.com/image-test, newTag: v1}}]
"""

Object = dict[str, Any]
Rendered = dict[str, list[Object]]
"""The objects, by the overlay or the components that they are rendered of."""


def combinations() -> Iterator[list[str]]:
    for choice in product(*([None, *names] for names in CHOICES)):
        names = [name for name in choice if name]
        # A rollout is a canary by itself.
        if not ("rollouts" in names and {"canary", "blue-green"} & {*names}):
            yield names


def render(containers: Containers, folder: Path) -> Rendered:
    """All that can be made of `folder`, which is a project's deploy/kubernetes."""
    overlays = {path.name: path for path in (folder / "overlays").iterdir()}
    for names in combinations():
        components = [f"../../components/{name}" for name in names]
        overlay = folder / "combinations" / ("+".join(names) or "base")
        overlay.mkdir(parents=True)
        text = COMBINATION.format(components=json.dumps(components))
        (overlay / "kustomization.yaml").write_text(text)
        overlays[overlay.name] = overlay
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
