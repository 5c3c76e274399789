"""Fast Mamba operators for vision: selective scans, wavelet convolutions, convolutions with folded batch norm."""

from mobilemamba_kernels._version import __version__
from mobilemamba_kernels.backends import report, use_backend
from mobilemamba_kernels.interop import patch, patched, unpatch
from mobilemamba_kernels.ops.bidirectional_selective_scan import bidirectional_selective_scan
from mobilemamba_kernels.ops.causal_conv1d import causal_conv1d_fn
from mobilemamba_kernels.ops.causal_conv1d_update import causal_conv1d_update
from mobilemamba_kernels.ops.conv2d_act import conv2d_act
from mobilemamba_kernels.ops.cross_merge import cross_merge_fn
from mobilemamba_kernels.ops.cross_scan import cross_scan_fn
from mobilemamba_kernels.ops.depthwise_conv2d_act import depthwise_conv2d_act
from mobilemamba_kernels.ops.feed_forward import feed_forward
from mobilemamba_kernels.ops.fold_batch_norm import fold_batch_norm
from mobilemamba_kernels.ops.haar_dwt2d import haar_dwt2d
from mobilemamba_kernels.ops.haar_idwt2d import haar_idwt2d
from mobilemamba_kernels.ops.pack_weight import pack_weight
from mobilemamba_kernels.ops.pointwise_conv2d_act import pointwise_conv2d_act
from mobilemamba_kernels.ops.selective_scan import selective_scan_fn, selective_scan_ref
from mobilemamba_kernels.ops.selective_state_update import selective_state_update
from mobilemamba_kernels.ops.squeeze_excite import squeeze_excite
from mobilemamba_kernels.ops.ss2d_bidirectional import ss2d_bidirectional
from mobilemamba_kernels.ops.wavelet_depthwise_conv2d import wavelet_depthwise_conv2d

__all__ = [
    "__version__",
    "bidirectional_selective_scan",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "conv2d_act",
    "cross_merge_fn",
    "cross_scan_fn",
    "depthwise_conv2d_act",
    "feed_forward",
    "fold_batch_norm",
    "haar_dwt2d",
    "haar_idwt2d",
    "pack_weight",
    "patch",
    "patched",
    "pointwise_conv2d_act",
    "report",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "squeeze_excite",
    "ss2d_bidirectional",
    "unpatch",
    "use_backend",
    "wavelet_depthwise_conv2d",
]
