"""Operations that torch writes in terms of others and that are traced as those: aliases, and what has no rule itself.

Operations of the same kind that passes know as they are (``linear``, ``layer_norm``, ``einsum``, ``reshape``,
attention, recurrent layers) are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["COMPOSITES"]

#: every overload of these that is composite
_NAMES = """
multiply divide true_divide subtract concat concatenate hstack vstack dstack column_stack row_stack absolute
negative positive clip fix arccos arcsin arctan arctanh arcsinh arccosh arctan2 special_expit special_logit
special_log1p special_expm1 special_exp2 special_erf special_erfc special_erfinv special_digamma special_gammaln
special_sinc special_softmax special_log_softmax special_logsumexp special_round special_xlogy float_power
broadcast_tensors broadcast_to tile fliplr flipud swapdims moveaxis take_along_dim ravel atleast_1d atleast_2d
atleast_3d meshgrid cartesian_prod combinations pad_sequence sum_to_size tensor_split hsplit vsplit dsplit
diag adjoint view_as reshape_as expand_as unsafe_chunk
outer ger inner kron tensordot chain_matmul linalg_multi_dot linalg_matmul linalg_vecdot linalg_matrix_power
linalg_norm linalg_matrix_norm norm_except_dim pairwise_distance cosine_similarity nanmean diff trapz trapezoid cov
corrcoef var std var_mean std_mean max min quantile nanquantile msort logdet
cross_entropy_loss nll_loss nll_loss2d nll_loss_nd l1_loss kl_div poisson_nll_loss hinge_embedding_loss
margin_ranking_loss triplet_margin_loss cosine_embedding_loss multilabel_margin_loss
grid_sampler adaptive_max_pool1d fft_fftshift fft_ifftshift fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn
fft_ifftn fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_hfft fft_ihfft real imag stft istft
""".split()


COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def _overloads() -> Iterator[Any]:
    for name in _NAMES:
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if torch._C._dispatch_has_kernel(op.name()) and op.has_kernel_for_dispatch_key(COMPOSITE):
                yield op


COMPOSITES = frozenset(_overloads())
