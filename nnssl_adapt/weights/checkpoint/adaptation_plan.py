"""The adaptation plan: what an nnssl checkpoint says about how it was pre-trained.

It lies in the checkpoint (``nnssl_adaptation_plan``), beside it (``adaptation_plan.json``), or both. Its layout is
written down in nnssl's ``AdaptationPlan``; tuples and lists, ints and floats are mixed freely.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from nnssl_adapt.errors import AdaptationPlanError, ArchitectureError
from nnssl_adapt.text import read_json
from nnssl_adapt.weights.checkpoint.state_dict import unwrapped_name
from nnssl_adapt.weights.network.architectures import Architecture, Shape

EMBEDDED_KEY = "nnssl_adaptation_plan"

_CONFIGURATIONS = ("onemmiso", "median", "noresample", "3d_fullres")
"""nnssl writes exactly one of the first three; plans made by hand have nnU-Net's name, and sometimes others beside it."""


def _number(value: Any) -> Any:
    """A number; text and truth values, which pydantic would turn into one, are refused."""
    if isinstance(value, (bool, str)):
        raise ValueError("expected a number")
    return value


def _whole(value: Any) -> Any:
    """An int given as 32.0 or 32; anything else is left for the validation to name."""
    return int(value) if isinstance(value, float) and value.is_integer() else _number(value)


def _words(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, str) else value


Voxels = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Patch = tuple[Voxels, Voxels, Voxels]
Millimetres = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Axis = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
ModuleName = Annotated[str, AfterValidator(unwrapped_name)]


class AdaptationPlan(BaseModel):
    """How a checkpoint was pre-trained, and where its encoder lies.

    Axes are array order (Z, Y, X) after the pre-training's ``transpose_forward``.

    Attributes:
        architecture: the network (the encoder of which was trained).
        spacing: voxel size in mm, or None where images kept their own. Of a 2D network two numbers, (Y, X).
        patch_size: the patch in voxels that the network saw, not the recommended one. Of a 2D network one slice, (1, Y, X).
        recommended_patch_size: what the authors recommend for fine-tuning, in voxels.
        num_input_channels: image channels in pre-training.
        normalization_schemes: nnU-Net's names of the normalisation, one a channel.
        use_mask_for_norm: whether only nonzero voxels counted for it, one a channel.
        key_to_encoder: dotted prefix of the encoder's tensors; this and the other names are without wrappers' prefixes.
        key_to_stem: dotted prefix of the stem's.
        keys_to_in_proj: modules that see the image's channels; several names of one module are usual.
        key_to_lpe: the learned positional embedding of a transformer.
        citations: what to cite, as ``{type, name, apa_citations | bibtex_citations}``.
        trainer_name: nnssl's trainer, where it is known.
        supervised: whether the weights are a segmentation network's, so that its decoder is worth keeping.
        transpose_forward: order in which the training's images had their array axes put (nnU-Net's key); identity for nnssl.
        head_names: what the outputs of a supervised network stand for, in order; empty where unknown.
        orientation: three letters such as ``RPI`` where the weights want one orientation, as the Spinal Cord Toolbox
            writes them (the directions that the axes come from); None where any will do.
        channel_names: of the image channels in order; empty where unknown.
        intensity: nnU-Net's statistics of the foreground's intensities, one a channel; empty where unknown.
        raw: the plan exactly as found.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")

    architecture: Architecture
    spacing: tuple[Millimetres, Millimetres, Millimetres] | tuple[Millimetres, Millimetres] | None
    patch_size: Patch
    recommended_patch_size: Patch | None = None
    num_input_channels: Voxels = 1
    normalization_schemes: Words = ("ZScoreNormalization",)
    use_mask_for_norm: tuple[bool, ...] = (False,)
    key_to_encoder: ModuleName | None = None
    key_to_stem: ModuleName | None = None
    keys_to_in_proj: Annotated[tuple[ModuleName, ...], BeforeValidator(_words)] = ()
    key_to_lpe: ModuleName | None = None
    citations: tuple[dict[str, Any], ...] = ()
    trainer_name: str | None = None
    supervised: bool = False
    transpose_forward: tuple[Axis, Axis, Axis] = (0, 1, 2)
    head_names: tuple[str, ...] = ()
    orientation: str | None = None
    channel_names: tuple[str, ...] = ()
    intensity: tuple[dict[str, Any], ...] = ()
    raw: dict[str, Any] = Field(default_factory=dict, repr=False)

    @field_validator("transpose_forward")
    @classmethod
    def _each_axis_once(cls, axes: tuple[int, int, int]) -> tuple[int, int, int]:
        if sorted(axes) != [0, 1, 2]:
            raise ValueError("expected each of the axes 0, 1 and 2 once")
        return axes

    @classmethod
    def parse(cls, content: Any, where: str) -> AdaptationPlan:
        """Read a plan in nnssl's layout. ``where`` names the file in the AdaptationPlanError that a bad one raises."""
        if not isinstance(content, Mapping):
            raise AdaptationPlanError(f"{where}: the adaptation plan is a {type(content).__name__}, expected a mapping")
        architecture_plans = content.get("architecture_plans")
        if not isinstance(architecture_plans, Mapping):
            raise AdaptationPlanError(f"{where}: the adaptation plan has no 'architecture_plans' mapping")
        configuration = _configuration(content, where)
        try:
            architecture = Architecture.from_adaptation(architecture_plans)
        except ArchitectureError as error:
            raise AdaptationPlanError(f"{where}: {in_one_line(error)}") from error
        fields = {
            "architecture": architecture,
            "spacing": configuration.get("spacing"),
            "patch_size": content.get("pretrain_patch_size") or configuration.get("patch_size"),
            "recommended_patch_size": content.get("recommended_downstream_patchsize"),
            "num_input_channels": content.get("pretrain_num_input_channels"),
            "normalization_schemes": configuration.get("normalization_schemes"),
            "use_mask_for_norm": configuration.get("use_mask_for_norm"),
            "citations": content.get("citations"),
        }
        optional = ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe", "trainer_name")
        fields.update({key: content.get(key) for key in optional})
        if fields["patch_size"] is None:
            fields["patch_size"] = fields["recommended_patch_size"]
        always = {"architecture", "spacing", "patch_size"}
        given = {key: value for key, value in fields.items() if value is not None or key in always}
        try:
            return cls.model_validate({**given, "raw": dict(content)})
        except ValidationError as error:
            raise AdaptationPlanError(f"{where}: the adaptation plan is wrong at {first_problem(error)}") from error

    @classmethod
    def load(cls, path: Path) -> AdaptationPlan:
        """Read an ``adaptation_plan.json``. Raises AdaptationPlanError naming the file and what is wrong."""
        return cls.parse(read_json(path, AdaptationPlanError, "pre-training plan", object), str(path))

    @property
    def names_keys(self) -> bool:
        """Whether it is a plan in nnssl's layout, which names where encoder and stem lie."""
        return "architecture_plans" in self.raw

    @property
    def token_grid(self) -> Shape | None:
        """Tokens per axis (Z, Y, X) of a transformer on the pre-training patch, where it divides; else None."""
        return _token_grid(self.architecture, self.patch_size)

    @property
    def token_grids(self) -> tuple[Shape | None, ...]:
        """As :attr:`token_grid`, of the patch and of the recommended patch."""
        patches = (self.patch_size, self.recommended_patch_size)
        return tuple(_token_grid(self.architecture, patch) for patch in patches if patch)

    @property
    def training(self) -> dict[str, Any]:
        """How the network was trained and where it lies: all fields, but not who trained it and what to cite."""
        return {name: value for name, value in self if name not in ("raw", "citations", "trainer_name")}

    def differences(self, other: AdaptationPlan) -> list[str]:
        """Names of the fields in which two plans for the same weights disagree."""
        return [name for name in self.training if not _same(self, other, name)]


def _token_grid(architecture: Architecture, patch_size: Shape) -> Shape | None:
    """Tokens per axis that a transformer cuts a patch (Z, Y, X) into; None for a CNN or a patch that doesn't divide."""
    steps = architecture.total_stride
    if not architecture.is_transformer or any(n % s for n, s in zip(patch_size, steps, strict=True)):
        return None
    z, y, x = (n // s for n, s in zip(patch_size, steps, strict=True))
    return z, y, x


def _same(one: AdaptationPlan, other: AdaptationPlan, name: str) -> bool:
    left, right = getattr(one, name), getattr(other, name)
    if name == "spacing" and left and right:
        return all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _configuration(content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The one pre-training configuration that the plan holds."""
    pretrain_plan = content.get("pretrain_plan")
    configurations = pretrain_plan.get("configurations") if isinstance(pretrain_plan, Mapping) else None
    if not isinstance(configurations, Mapping) or not configurations:
        raise AdaptationPlanError(f"{where}: the adaptation plan has no 'pretrain_plan.configurations'")
    names = list(configurations)
    name = names[0] if len(names) == 1 else next((n for n in _CONFIGURATIONS if n in configurations), None)
    if name is None:
        raise AdaptationPlanError(
            f"{where}: pretrain_plan.configurations has {', '.join(map(str, names))}; expected one, or one called "
            + " or ".join(_CONFIGURATIONS)
        )
    configuration = configurations[name]
    if not isinstance(configuration, Mapping):
        raise AdaptationPlanError(f"{where}: pretrain_plan.configurations.{name} is not a mapping")
    return configuration


def first_problem(error: ValidationError) -> str:
    """Where pydantic found the first thing wrong, what, and what stands there, in one line."""
    problems = error.errors()
    # Of a field for two or three axes each form complains; the one of another length says nothing.
    lengths = ("too_long", "too_short", "missing")
    problem = next((p for p in problems if not (_in_form(p["loc"]) and p["type"] in lengths)), problems[0])
    path = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("tuple[")) or "the top"
    return in_one_line(f"{path}: {problem['msg']}, got {problem['input']!r}")


def _in_form(location: tuple[int | str, ...]) -> bool:
    return any(str(part).startswith("tuple[") for part in location)


def in_one_line(message: object) -> str:
    """A message that quotes a file, which may hold anything at any length, in one short line."""
    return textwrap.shorten(str(message), 400, placeholder=" …")
