"""What label values mean: classes, regions, the ignore label, and which output of the network stands for what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nnssl_adapt.errors import DatasetJsonError

if TYPE_CHECKING:
    import torch

LabelOrRegion: TypeAlias = int | tuple[int, ...]
"""One label value, or the label values that a region unites."""


@dataclass(frozen=True)
class LabelScheme:
    """What the numbers in label files mean, and which outputs a network for them has (nnU-Net's rules).

    Attributes:
        labels: ``labels`` of dataset.json: name → value, or the values of a region.
        all_labels: every label value in ascending order, with 0 and without the ignore label.
        has_regions: whether any entry unites several values. Networks then have one sigmoid output a region; otherwise
            one softmax output a label, background included.
        regions: foreground entries in the order of dataset.json, if there are regions; else empty.
        regions_class_order: label value that each region is written as, later ones over earlier ones.
        ignore_label: value of voxels that nobody annotated, or None.
        foreground: what is learnt and evaluated: the regions, else the labels without 0.
        class_names: names of ``foreground``, in its order.
    """

    labels: dict[str, LabelOrRegion]
    all_labels: tuple[int, ...]
    has_regions: bool
    regions: tuple[LabelOrRegion, ...]
    regions_class_order: tuple[int, ...]
    ignore_label: int | None
    foreground: tuple[LabelOrRegion, ...]
    class_names: tuple[str, ...]

    @classmethod
    def from_dataset_json(cls, content: Mapping[str, Any], where: str | Path = "dataset.json") -> LabelScheme:
        """Read the scheme from dataset.json's content. Raises DatasetJsonError naming ``where``, key and expectation."""
        labels = _parsed_labels(content.get("labels"), where)
        ignore = _parsed_ignore(labels, where)
        declared = {name: value for name, value in labels.items() if name != "ignore"}
        values = sorted({v for entry in declared.values() for v in _values(entry)})
        if values != list(range(len(values))):
            if ignore is not None and sorted({*values, ignore}) == list(range(len({*values, ignore}))):
                raise DatasetJsonError(
                    f"{where}: 'labels': 'ignore' is {ignore}, in the middle of the others ({values}); it must be the "
                    f"highest value: renumber here and in the label files so that 'ignore' is {len(values)}"
                )
            raise DatasetJsonError(
                f"{where}: 'labels' must use the values 0, 1, 2, ... without gaps, got {values}; renumber them here and "
                "in the label files"
            )
        if ignore is not None and ignore in values:
            others = [name for name, entry in declared.items() if ignore in _values(entry)]
            raise DatasetJsonError(
                f"{where}: 'labels': 'ignore' and {', '.join(map(repr, others))} share the value {ignore}; 'ignore' must have "
                "a value of its own, the highest"
            )
        if ignore is not None and ignore != len(values):
            raise DatasetJsonError(
                f"{where}: 'labels': 'ignore' must be the highest value, expected {len(values)}, got {ignore}"
            )
        has_regions = any(len(_values(entry)) > 1 for entry in declared.values())
        foreground = {name: entry for name, entry in declared.items() if set(_values(entry)) != {0}}
        regions = tuple(foreground.values()) if has_regions else ()
        order = _parsed_class_order(content.get("regions_class_order"), regions, where) if has_regions else ()
        names = dict(foreground)
        if not has_regions:
            names = dict(sorted(((name, _values(entry)[0]) for name, entry in foreground.items()), key=lambda e: e[1]))
        return cls(
            labels=labels,
            all_labels=tuple(values),
            has_regions=has_regions,
            regions=regions,
            regions_class_order=order,
            ignore_label=ignore,
            foreground=tuple(names.values()),
            class_names=tuple(names),
        )

    @property
    def foreground_labels(self) -> tuple[int, ...]:
        """Label values without background and ignore, ascending."""
        return tuple(v for v in self.all_labels if v != 0)

    @property
    def num_heads(self) -> int:
        """Output channels of a network: one a region, or one a label with background."""
        return len(self.regions) if self.has_regions else len(self.all_labels)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the network's outputs in order: the regions, or all labels from ``background`` on."""
        return self.class_names if self.has_regions else ("background", *self.class_names)

    @property
    def values_in_files(self) -> tuple[int, ...]:
        """Values that a label file may hold: all labels and the ignore label."""
        return self.all_labels if self.ignore_label is None else (*self.all_labels, self.ignore_label)

    @property
    def sampled_classes(self) -> tuple[LabelOrRegion, ...]:
        """Classes whose voxels preprocessing remembers for oversampling, in nnU-Net's order.

        The foreground; with an ignore label also everything annotated, background and outside (-1) included, since
        patches must then be drawn from annotated voxels only.
        """
        classes: tuple[LabelOrRegion, ...] = self.regions if self.has_regions else self.foreground_labels
        return classes if self.ignore_label is None else (*classes, (-1, *self.all_labels))

    def heads_to_labels(self, logits: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """Turn network outputs (K, ...) into a label map (...) of the same kind: array to array, tensor to tensor.

        Without regions the largest output wins. With regions each one whose sigmoid exceeds 0.5 is written as its
        value in ``regions_class_order``, later over earlier. The type is uint8, or int16 for values of 255 and more.
        """
        import torch  # a second's import that reading datasets need not pay

        outputs = torch.from_numpy(logits) if isinstance(logits, np.ndarray) else logits
        if outputs.shape[0] != self.num_heads:
            raise ValueError(f"expected {self.num_heads} network outputs, got {outputs.shape[0]}")
        result = self.regions_to_labels(outputs) if self.has_regions else outputs.argmax(0).to(self._label_dtype)
        return result.numpy() if isinstance(logits, np.ndarray) else result

    def regions_to_labels(self, outputs: Iterable[torch.Tensor]) -> torch.Tensor:
        """The same of regions, whose outputs (...) may come one after the other."""
        import torch

        result: torch.Tensor | None = None
        for output, value in zip(outputs, self.regions_class_order, strict=True):
            if result is None:
                result = torch.zeros(output.shape, dtype=self._label_dtype, device=output.device)
            result[torch.sigmoid(output.float()) > 0.5] = value
        assert result is not None  # there is a region
        return result

    @property
    def _label_dtype(self) -> torch.dtype:
        import torch

        return torch.uint8 if max(self.values_in_files) < 255 else torch.int16


def _values(entry: LabelOrRegion) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _parsed_labels(content: Any, where: str | Path) -> dict[str, LabelOrRegion]:
    if not isinstance(content, Mapping) or not content:
        raise DatasetJsonError(f"{where}: 'labels' must map names to numbers, e.g. {{'background': 0, 'tumour': 1}}")
    if all(str(name).isdigit() for name in content) and all(isinstance(v, str) for v in content.values()):
        raise DatasetJsonError(
            f"{where}: 'labels' maps numbers to names, as nnU-Net 1 did; write names to numbers: {{'background': 0, ...}}"
        )
    labels: dict[str, LabelOrRegion] = {}
    for name, value in content.items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        try:
            if not entries or any(isinstance(e, bool) or int(e) != float(e) or int(e) < 0 for e in entries):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise DatasetJsonError(
                f"{where}: 'labels': {name!r} must be a whole number ≥ 0 or a list of them, got {value!r}"
            ) from None
        numbers = tuple(int(e) for e in entries)
        labels[str(name)] = numbers if isinstance(value, (list, tuple)) else numbers[0]
    if labels.get("background") != 0:
        got = f"got {labels['background']!r}" if "background" in labels else "it is missing"
        raise DatasetJsonError(f"{where}: 'labels' must have 'background': 0, {got}")
    return labels


def _parsed_ignore(labels: Mapping[str, LabelOrRegion], where: str | Path) -> int | None:
    ignore = labels.get("ignore")
    if isinstance(ignore, tuple):
        raise DatasetJsonError(f"{where}: 'labels': 'ignore' must be one number, got {list(ignore)}")
    return ignore


def _parsed_class_order(order: Any, regions: Sequence[LabelOrRegion], where: str | Path) -> tuple[int, ...]:
    if order is None:
        raise DatasetJsonError(
            f"{where}: 'labels' has regions (lists of values), so 'regions_class_order' is needed: the value that each of "
            f"the {len(regions)} regions is written as, in the order of 'labels'"
        )
    if not isinstance(order, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, int) for v in order):
        raise DatasetJsonError(f"{where}: 'regions_class_order' must be a list of whole numbers, got {order!r}")
    if len(order) != len(regions):
        raise DatasetJsonError(
            f"{where}: 'regions_class_order' must have one value for each of the {len(regions)} regions, got {len(order)}"
        )
    return tuple(order)


def label_problem(path: Path, values: Iterable[int], expected: Iterable[int]) -> str | None:
    """Say which of a label file's values dataset.json does not have; None if it has them all."""
    unexpected = sorted(set(values) - set(expected))
    if not unexpected:
        return None
    shown = ", ".join(str(v) for v in unexpected[:10]) + (", ..." if len(unexpected) > 10 else "")
    return f"{path} has label value(s) {shown}; dataset.json has {', '.join(str(v) for v in expected)}"
