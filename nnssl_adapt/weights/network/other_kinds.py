"""Kinds of networks that are our own beside those of dynamic_network_architectures: class name → kind."""

from __future__ import annotations

from nnssl_adapt.weights.network import max_pool_unet, segresnet, stu_net, swin_unetr
from nnssl_adapt.weights.network.kinds import NetworkKind

OTHER_KINDS: dict[str, NetworkKind] = {
    # Before SegResNet, whose blocks have some of its names.
    stu_net.CLASS_NAME: stu_net.STU_NET,
    swin_unetr.CLASS_NAME: swin_unetr.SWIN_UNETR,
    segresnet.CLASS_NAME: segresnet.SEG_RES_NET,
    max_pool_unet.CLASS_NAME: max_pool_unet.MAX_POOL_UNET,
}
