"""Stand-ins of every published file at its real size: names, shapes and wrappers as published, one number behind each tensor.

torch saves an expanded tensor as the one number that it holds, so that a network of a billion weights is a few kilobytes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from support import max_pool_files, nnunet_v1
from support.monai_files import prefixed, seg_res_net, swin_file, swin_names, swin_unetr
from support.nnssl_networks import CNN, adaptation_plan, cnn_keys, nnunet_plans, primus_keys
from support.stu_net_files import PublishedSTUNet
from torch import nn

from nnssl_adapt.weights.network.architectures import Architecture, build_network, without_memory

CHECKPOINT = "checkpoint_final.pth"
WIDTHS = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "n_stages": 6,
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *([[2, 2, 2]] * 5)],
}
RES_ENC_L = {**CNN, **WIDTHS, "n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}
PLAIN = {**CNN, **WIDTHS, "n_conv_per_stage": [2] * 6, "n_conv_per_stage_decoder": [2] * 5}
PRIMUS = {"patch_embed_size": [8, 8, 8], "drop_path_rate": 0.2, "init_values": 0.1, "scale_attn_inner": True}
PRIMUS_M = {**PRIMUS, "embed_dim": 864, "eva_depth": 16, "eva_numheads": 12}
VIT = {**PRIMUS, "embed_dim": 1056, "eva_depth": 40, "eva_numheads": 16}


def hollow(tensors):
    """The same names, shapes and types with one number behind each."""
    return {name: torch.ones((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}


@cache
def _tensors(class_name, arguments, channels, outputs, patch):
    architecture = Architecture(class_name, json.loads(arguments))
    with without_memory(architecture):
        network = build_network(architecture, channels, outputs, patch)
    return hollow(network.state_dict())


def tensors_of(class_name, arguments, channels=1, outputs=1, patch=(160, 160, 160)):
    """Of one of our networks, at any size."""
    return _tensors(class_name, json.dumps(arguments), channels, outputs, patch)


def saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def files_of(model):
    """Of an entry of the catalogue: names below its folder (or in its zip) → content."""
    for pattern, make in _LAYOUTS:
        if re.fullmatch(pattern, model.id):
            return make(model)
    raise AssertionError(f"no stand-in for {model.id}: add its layout to tests/support/published_files.py")


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


# -- layouts ---------------------------------------------------------------------------------------------------------


def _nnssl_cnn(model):
    plan = adaptation_plan("ResidualEncoderUNet", RES_ENC_L, cnn_keys("ResidualEncoderUNet"), [160] * 3, 1)
    return {
        CHECKPOINT: saved(
            {"network_weights": tensors_of("ResidualEncoderUNet", RES_ENC_L), "nnssl_adaptation_plan": plan}
        )
    }


def _multi_talent(model):
    tensors = {}
    for name, tensor in tensors_of("ResidualEncoderUNet", RES_ENC_L).items():
        for stem in ("17", "23") if name.startswith("encoder.stem.") else ("",):
            tensors[name.replace("encoder.stem.", f"encoder.stem.{stem}.") if stem else name] = tensor
    plan = adaptation_plan("ResidualEncoderUNet", RES_ENC_L, cnn_keys("ResidualEncoderUNet"), [160] * 3, 1)
    content = {"network_weights": tensors, "nnssl_adaptation_plan": plan, "trainer_name": "MultiTalentTrainer"}
    return {CHECKPOINT: saved(content)}


def _nnssl_primus(arguments):
    def make(model):
        plan = adaptation_plan("Primus", arguments, primus_keys(), [160] * 3, 1)
        content = {"network_weights": tensors_of("Primus", arguments), "nnssl_adaptation_plan": plan}
        return {CHECKPOINT: saved(content)}

    return make


def _without_plan(class_name, arguments):
    def make(model):
        return {Path(model.source).name: saved({"network_weights": tensors_of(class_name, arguments)})}

    return make


def _nnunet_folder(root, dataset, class_name, arguments, channels, outputs, names=("CT",)):
    plans = {**nnunet_plans(class_name, len(names)), "dataset_name": dataset}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"] = arguments
    configuration["patch_size"] = [128, 128, 128]
    labels = {"background": 0, **{f"label {index}": index for index in range(1, outputs)}}
    content = {
        "network_weights": tensors_of(class_name, arguments, channels, outputs),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
    }
    return {
        f"{root}/plans.json": json.dumps(plans).encode(),
        f"{root}/dataset.json": json.dumps({"channel_names": dict(enumerate(names)), "labels": labels}).encode(),
        f"{root}/fold_0/{CHECKPOINT}": saved(content),
    }


def _total_segmentator(model):
    dataset = (model.files or ("Dataset831_TotalSegmentator.zip",))[0].removesuffix(".zip")
    folder = f"{dataset}/nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
    return _nnunet_folder(folder, dataset, "PlainConvUNet", PLAIN, 1, 25, model.channels)


def _nninteractive(model):
    return _nnunet_folder("nnInteractive_v1.0", "Dataset225_nnInteractiveV2", "ResidualEncoderUNet", RES_ENC_L, 8, 2)


def _contrast_agnostic(model):
    arguments = {**PLAIN, "strides": [*WIDTHS["strides"][:5], [1, 2, 2]]}
    folder = "Dataset713_ContrastAgnostic/nnUNetTrainer__nnUNetPlans__3d_fullres"
    return _nnunet_folder(folder, "Dataset713_ContrastAgnostic", "PlainConvUNet", arguments, 1, 2, ("contrast",))


def _stu_net(model):
    layout = model.layout["arguments"]
    steps = [[2, 2, 2]] * 4 + [[1, 1, 2]]
    with torch.device("meta"):
        network = PublishedSTUNet(
            1, 105, layout["n_blocks_per_stage"], layout["features_per_stage"], steps, [[3, 3, 3]] * 6
        )
    content = nnunet_v1.plans(modalities=("CT",), patch=(128, 128, 128), spacing=(1.5, 1.5, 1.5))
    content["plans_per_stage"][0]["pool_op_kernel_sizes"] = steps
    with TemporaryDirectory() as place:
        network.state_dict = lambda: hollow(nn.Module.state_dict(network))
        nnunet_v1.save(Path(place), network, "STUNetTrainer_base", content=content, filename=model.files[0])
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def _filename(model):
    return model.files[0] if model.files else "weights.pth"


class _AtSize:
    """MONAI's Swin UNETR at a published width: names of its own class, shapes of ours, which is proved equal."""

    def __init__(self, width, version, channels, outputs):
        arguments = {"feature_size": width, "version": version, "patch_merging": "old"}
        ours = tensors_of("SwinUNETR", arguments, channels, outputs, (64, 64, 64))
        self.names = {name: ours[swin_names(name)] for name in _swin_names(version)}

    def state_dict(self):
        return self.names


@cache
def _swin_names(version):
    return tuple(swin_unetr(version=version).state_dict())


def _swin(family, width, version=1, outputs=14):
    def make(model):
        network = _AtSize(width, version, len(model.channels), outputs)
        return {_filename(model): saved(swin_file(family, network))}

    return make


def _seg_res_net(family):
    def make(model):
        return {_filename(model): saved(_hollow_content(seg_res_net(family, published=True)[1]))}

    return make


def _hollow_content(content):
    (key,) = content if len(content) == 1 else (None,)
    return {key: hollow(content[key])} if key else hollow(content)


def _vocomni_nnunet(model):
    tensors = tensors_of("PlainConvUNet", PLAIN, 1, 21)
    return {_filename(model): saved({"state_dict": prefixed("module.", tensors)})}


def _triad_plain(model):
    tensors = tensors_of("PlainConvUNet", PLAIN)
    return {"triad_plain.pth": saved({n: t for n, t in tensors.items() if n.startswith("encoder.")})}


def _fomo(model):
    found = {}
    for name, tensor in tensors_of("ResidualEncoderUNet", RES_ENC_L).items():
        if name.startswith("encoder."):
            found[f"model._orig_mod.{name.replace('stem.convs.0', 'stem.conv1').replace('.norm.', '.norm_op.')}"] = (
                tensor
            )
    return {"last.ckpt": saved({"state_dict": found, "pytorch-lightning_version": "2.4.0"})}


def _max_pool(layout, network_class, **sizes):
    def make(model):
        with torch.device("meta"):
            network = network_class(**sizes)
        network.state_dict = lambda: hollow(nn.Module.state_dict(network))
        return {_filename(model): saved(layout(network))}

    return make


_LAYOUTS = (
    (r"genesis-.*", _max_pool(max_pool_files.genesis, max_pool_files.PublishedUNet3D, base=32)),
    (r"suprem-unet", _max_pool(max_pool_files.suprem, max_pool_files.PublishedUNet3D, classes=0, base=32)),
    (r"fomo25-unet-b", _max_pool(max_pool_files.fomo25, max_pool_files.PublishedBaseline, filters=32)),
    (r"fomo25-unet-xl", _max_pool(max_pool_files.fomo25, max_pool_files.PublishedBaseline, filters=64)),
    (r"missingpiece-.*-multitalent", _multi_talent),
    (r"(openmind|missingpiece)-resencl-.*|nnfoundation-cnn", _nnssl_cnn),
    (r"openmind-primusm-.*", _nnssl_primus(PRIMUS_M)),
    (r"nnfoundation-vit", _nnssl_primus(VIT)),
    (r"ssl3d-resencl-.*", _without_plan("ResidualEncoderUNet", RES_ENC_L)),
    (r"ssl3d-primusm-.*", _without_plan("Primus", PRIMUS_M)),
    (r"totalsegmentator-.*", _total_segmentator),
    (r"nninteractive-.*", _nninteractive),
    (r"contrast-agnostic", _contrast_agnostic),
    (r"stunet-.*", _stu_net),
    (r"vocomni-nnunet", _vocomni_nnunet),
    *((rf"vocomni-{letter}", _swin("vocomni", width, 2, 21)) for letter, width in (("b", 48), ("l", 96), ("h", 192))),
    *((rf"voco-{letter}", _swin("voco", width, 2)) for letter, width in (("b", 48), ("l", 96), ("h", 192))),
    (r"voco-10k", _swin("encoder", 48, 2)),
    (r"nvidia-swinvit", _swin("nvidia", 48)),
    (r"nvidia-swinunetr-dae", _swin("disruptive", 48)),
    (r"nvidia-swinunetr-btcv", _swin("unknown", 48)),
    (r"suprem-swinunetr", _swin("suprem", 48)),
    (r"brainsegfounder-.*", _swin("brainsegfounder", 48)),
    (r"triad-swinb-.*", _swin("encoder", 48)),
    (r"triad-plain-.*", _triad_plain),
    (r"ct-fm", _seg_res_net("ctfm")),
    (r"ct-fm-extractor", _seg_res_net("ctfm_extractor")),
    (r"ct-fm-whole-body", _seg_res_net("whole_body")),
    (r"suprem-segresnet", _seg_res_net("suprem")),
    (r"vista3d-.*", _seg_res_net("vista3d")),
    (r"fomo\d+k", _fomo),
)
