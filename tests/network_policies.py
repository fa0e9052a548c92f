"""What NetworkPolicies allow, for manifests whose pods are all in one namespace."""

from typing import Any

Object = dict[str, Any]
Labels = dict[str, str]


def matches(selector: Object, labels: Labels) -> bool:
    assert selector.keys() <= {"matchLabels"}
    wanted: Labels = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def _about(policies: list[Object], direction: str, pod: Labels) -> list[Object]:
    return [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod)
    ]


def _is_peer(peer: Object, pod: Labels | None, namespace: Labels | None) -> bool:
    """A pod of another namespace has `namespace`, of which one's own has None."""
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        is_there = matches(peer["namespaceSelector"], namespace or {})
        return is_there and matches(peer.get("podSelector", {}), pod or {})
    return namespace is None and matches(peer["podSelector"], pod or {})


def accepts(
    policies: list[Object],
    target: Labels,
    port: str,
    pod: Labels | None = None,
    namespace: Labels | None = None,
) -> bool:
    """Whether `target` takes connections at `port` from `pod`, or from any pod of `namespace`."""
    specs = _about(policies, "Ingress", target)
    return not specs or any(
        {"port": port} in rule["ports"]
        and any(_is_peer(peer, pod, namespace) for peer in rule["from"])
        for spec in specs
        for rule in spec.get("ingress", [])
    )


def may_call(
    policies: list[Object],
    pod: Labels,
    other: Labels,
    port: int,
    namespace: Labels | None = None,
) -> bool:
    """Whether `pod` may connect to the pod `other` of its own namespace, or of `namespace`."""
    specs = _about(policies, "Egress", pod)
    return not specs or any(
        {"port": port} in rule["ports"]
        and any(_is_peer(peer, other, namespace) for peer in rule["to"])
        for spec in specs
        for rule in spec.get("egress", [])
    )
