"""The r singular triplets of one part of a weight's spectrum, in float64, with a certificate.

What.  W (m, n) = U diag(s) V^T; `singular_triplets` returns r columns of U and V and their s, chosen by
`mode`: the smallest ("min", what MiLoRA adapts), the largest ("max"), the middle, or a random draw.

How.  X is W or its transpose, with p rows >= q columns.  The eigenvectors of the Gram matrix G = X^T X are
the right vectors of X, and G is (q, q) whatever p is.  The two ends come from a Krylov space: of G applied
as X^T (X v) for the largest, of G^-1 by a Cholesky factor for the smallest, shifted to just below the
spectrum where that does not reach down to zero.  The interior, small matrices and large r come from all
the eigenvectors of G.  One Rayleigh-Ritz step in X itself (a QR of X V and the SVD of its small factor) then
gives s and U from the weight, not from its square.

Precision.  float64 throughout: a checkpoint's bfloat16, float16 or float32 is upcast exactly, and the squared
condition number of G costs digits that float64 has (s is good to about eps * s_max^2 / (2 s)).  A float32 SVD
is not an alternative: its error is relative to the largest singular value, which in a language model is 10^4
to 10^6 times the smallest.  float32 serves once, to place the shift, where any value below the spectrum does.

Cost.  p q^2 operations for G and q^3 / 3 for its factor, then 4 q^2 for each of some hundreds of vectors;
9 q^3 where all eigenvectors are needed.  1.5 q^2 float64 numbers of memory and the Krylov basis, 3 q^2 for all
eigenvectors; X is upcast one block of rows at a time.

Bits.  The same on the same processor with the same number of threads; a BLAS splits its sums by that number, so the
engine gives every weight one thread (workers.py).

Failure.  Every result is measured against W (certificate.py), and one that is not converged, or in doubt, is
not returned: one more application of the operator is tried, then the next path, all eigenvectors of G, then,
where squaring lost the wanted end, a full float64 SVD, which holds a float64 copy of W.  The certificate says
which path ran and why.

Sources: MiLoRA, https://arxiv.org/abs/2406.09044.  Perturbation of singular subspaces: P.-A. Wedin (1972),
https://doi.org/10.1007/BF01932678.  The Krylov space: lanczos.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from milora_init.linalg import lanczos
from milora_init.linalg.blocked_matrix import BlockedMatrix
from milora_init.linalg.certificate import EPS, Certificate, certify, gaps, is_good
from milora_init.linalg.cholesky import Cholesky, Operator, cholesky

__all__ = ["Certificate", "Mode", "Triplets", "singular_triplets", "wanted_indices"]

Mode = Literal["min", "max", "mid", "random"]

KRYLOV_FROM = 512  # the smallest q for which a Krylov space beats all eigenvectors
KRYLOV_BLOCK = 24  # columns; MKL is fastest on multiples of 24
ROUGH_BLOCK = 48  # a better guess of the shift, in a few steps
ANGLES = (4.0, 0.04)  # times the tolerance: where the Krylov loop stops, and if that was not enough
NEAR_ONE = 16  # binary orders of magnitude
SHIFT = 0.95  # of the smallest eigenvalue of X^T X
TOLERANCE = 5e-8  # of the certified component error, an upper estimate: the true one is mostly far below
NULL = 100 * EPS  # times s_max: below it a singular value is rounding error
SMALL = EPS**0.5  # times s_max: below it X v / s has lost half its digits or more


@dataclass(frozen=True, slots=True)
class Triplets:
    """U (m, r), s (r,) descending, V (n, r), all float64 on the device of W.

    s_max is the largest singular value of W; on the path "lanczos" of mode "min" an estimate of it, from
    below, to a percent on trained weights and a tenth on a flat spectrum.
    """

    U: Tensor
    s: Tensor
    V: Tensor
    s_max: float
    certificate: Certificate


def wanted_indices(q: int, r: int, mode: Mode, seed: int) -> Tensor:
    """The (r,) ascending indices into a descending spectrum of q values that `mode` asks for."""
    if mode == "min":
        return torch.arange(q - r, q)
    if mode == "max":
        return torch.arange(r)
    if mode == "mid":
        start = (q - r) // 2
        return torch.arange(start, start + r)
    if mode == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(q, generator=generator)[:r].sort().values
    raise ValueError(f"mode is {mode!r}, expected one of {', '.join(get_args(Mode))}")


def singular_triplets(
    W: Tensor, r: int, *, mode: Mode = "min", seed: int = 0, tolerance: float = TOLERANCE
) -> Triplets:
    """The r singular triplets of W (m, n) that `mode` names, s descending, with a certificate.

    W may be of any floating dtype, on any device; for one without float64 the result is on the CPU.  In every
    column of V the entry of largest magnitude is positive.  `seed` draws the indices of mode "random" and the
    completion of U where s is zero.  `tolerance` is the largest certified component_error that is accepted.

    Raises ValueError if W is not a floating matrix, has NaN or Inf, or r is not in 1..min(m, n).
    """
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}, expected a floating-point matrix")
    q = min(W.shape)
    if not 1 <= r <= q:
        raise ValueError(f"r is {r}, expected 1 to {q} for a matrix of shape {tuple(W.shape)}")
    W = W.detach()
    if W.device.type == "mps":
        W = W.cpu()
    low, high = (float(x) for x in torch.aminmax(W))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"W of shape {tuple(W.shape)} has NaN or Inf entries")
    wanted = wanted_indices(q, r, mode, seed).to(W.device)

    wide = W.shape[0] < W.shape[1]
    # A power of two brings the entries near 1, exactly, so that no square over- or underflows, in float32 neither.
    # Those of a language model are near enough as they are.
    exponent = math.frexp(max(-low, high))[1]
    if abs(exponent) <= NEAR_ONE:
        exponent = 0
    X = BlockedMatrix(W.mT if wide else W, exponent)

    left, s, right, s_max, certificate = _solve(X, wanted, mode, seed, tolerance)
    U, V = (right, left) if wide else (left, right)
    sign = _signs(V)
    unit = math.ldexp(1.0, exponent)
    return Triplets(U * sign, s * unit, V * sign, s_max * unit, certificate)


_Solution = tuple[Tensor, Tensor, Tensor, float, Certificate]


def _solve(X: BlockedMatrix, wanted: Tensor, mode: Mode, seed: int, tolerance: float) -> _Solution:
    """Left (p, r), s (r,), right (q, r), s_max and the certificate, by the first path that is good enough."""
    q, r = X.X.shape[1], wanted.numel()
    if mode not in ("min", "max"):
        doubt = f"mode {mode} needs interior triplets"
    elif q < KRYLOV_FROM or r > q // 8:
        doubt = f"r = {r} of q = {q} is beyond a Krylov space"
    else:
        found, doubt = _by_lanczos(X, wanted, mode, tolerance)
        if found is not None:
            return found
    solution = _by_eigh(X, wanted, seed, doubt)
    if is_good(solution[1], solution[3], solution[4], tolerance):
        return solution
    error = f"eigh left a component error of {solution[4].component_error:.1e}"
    return _by_svd(X, wanted, f"{doubt}; {error}")


def _by_lanczos(X: BlockedMatrix, wanted: Tensor, mode: Mode, tolerance: float) -> tuple[_Solution | None, str]:
    """By a Krylov space; or None, and why."""
    q, r = X.X.shape[1], wanted.numel()
    factor, shift = None, 0.0
    if mode == "max":
        apply = X.normal_operator()
    else:
        factor, shift = _factor(X)
        if factor is None:
            return None, "the Gram matrix is not positive definite"
        apply = factor.solve
    block = KRYLOV_BLOCK
    max_basis = min(q - 2 * block, 16 * r + 768)
    doubt = ""
    for factor_of_tolerance in ANGLES:
        ritz = lanczos.largest(
            apply,
            q,
            r,
            block=block,
            max_basis=max_basis,
            tolerance=factor_of_tolerance * tolerance,
            device=X.X.device,
        )
        if isinstance(ritz, str):
            return None, ritz
        if not ritz.probe < float(ritz.values[-1]):
            return None, "an independent block found what the Krylov space had missed"
        basis = ritz.basis
        for note in ("", ", refined"):
            left, s, right, image = rayleigh_ritz(X, basis)
            s_max = float(s[0]) if factor is None else math.sqrt(_largest(factor) + shift)
            nearest = torch.full_like(s, ritz.nearest if factor is None else shift + 1 / ritz.nearest).sqrt()
            certificate = certify(
                X,
                left,
                s,
                right,
                image,
                (nearest, (s - nearest).abs()),
                s_max,
                path="lanczos",
                reason=f"r = {r} of q = {q}, {ritz.steps} steps of {block}{note}",
                complete="an independent block found nothing beyond the cut",
                inverse=None if factor is None else factor.solve,
            )
            if is_good(s, s_max, certificate, tolerance):
                return (left, s, right, s_max, certificate), ""
            basis = _refined(apply, right if factor is None else right.flip(1))
        doubt = f"lanczos left a component error of {certificate.component_error:.1e}"
    return None, doubt


def _refined(apply: Operator, basis: Tensor) -> Tensor:
    """A basis (q, r) of eigenvectors, the largest eigenvalue's first, after one more application of the operator.

    Where its eigenvalues span many orders of magnitude, rounding in the projected operator leaves in each vector a
    little of those far beyond the cut; an application damps exactly these.
    """
    image = apply(basis)
    return lanczos.orthonormalise(image / image.norm(dim=0).clamp_min(1e-300))[0]


def _factor(X: BlockedMatrix) -> tuple[Cholesky | None, float]:
    """The Cholesky factor of X^T X - shift I, and the shift.

    The spectrum of a clearly rectangular matrix does not reach down to zero, and a shift just below its
    smallest eigenvalue takes a third off the number of Krylov steps.  A rough, float32 eigenvalue will do:
    that the shifted matrix has a Cholesky factor is the proof that the shift is below the spectrum.
    """
    p, q = X.X.shape
    G = X.gram()
    if 2 * p >= 3 * q:
        rough = cholesky(G.to(torch.float32))
        if rough is not None:
            rough_inverse = lanczos.rough_largest(rough.solve, q, block=ROUGH_BLOCK, device=G.device)
            # Five bits of it are enough, and do not hang on the last bits of a float32.
            mantissa, exponent = math.frexp(SHIFT / rough_inverse)
            shift = math.ldexp(math.floor(32 * mantissa) / 32, exponent)
            del rough
            if shift > 0:
                G.diagonal().sub_(shift)
                factor = cholesky(G)
                if factor is not None:
                    return factor, shift
                G = X.gram()  # the attempt overwrote it
    return cholesky(G), 0.0


def _largest(factor: Cholesky) -> float:
    """The largest eigenvalue of the factored matrix, from below, to a tenth or so: only a scale."""
    q = factor.L.shape[0]
    block = torch.randn(q, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = block.to(factor.L.device)
    for _ in range(2):
        block, _ = lanczos.orthonormalise(factor.times(block))
    return float(torch.linalg.matrix_norm(block.mT @ factor.times(block), ord=2))


def _by_eigh(X: BlockedMatrix, wanted: Tensor, seed: int, reason: str) -> _Solution:
    eigenvalues, vectors = torch.linalg.eigh(X.gram())
    spectrum = eigenvalues.clamp_(min=0).sqrt_().flip(0)
    vectors = vectors.flip(1)
    left, s, right, image = rayleigh_ritz(X, vectors[:, wanted])
    s_max = max(float(spectrum[0]), float(s[0]))
    if bool((s <= SMALL * s_max).any()):
        left = _purify(X, left, s, spectrum, vectors, seed)
    spectrum[wanted] = s
    certificate = certify(X, left, s, right, image, gaps(spectrum, wanted), s_max, "eigh", reason, "all computed")
    return left, s, right, s_max, certificate


def _by_svd(X: BlockedMatrix, wanted: Tensor, reason: str) -> _Solution:
    full = X.whole()
    left, spectrum, right = torch.linalg.svd(full, full_matrices=False)
    del full
    left, s, right = left[:, wanted], spectrum[wanted], right.mT[:, wanted]
    s_max = float(spectrum[0])
    certificate = certify(
        X, left, s, right, X.times(right), gaps(spectrum, wanted), s_max, "svd", reason, "all computed"
    )
    return left, s, right, s_max, certificate


def rayleigh_ritz(X: BlockedMatrix, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets of X within an orthonormal basis (q, k): left (p, k), s, right (q, k), X right."""
    image = X.times(basis)
    Q, R = torch.linalg.qr(image)
    u, s, vh = torch.linalg.svd(R)
    return Q @ u, s, basis @ vh.mT, image @ vh.mT


def _purify(X: BlockedMatrix, left: Tensor, s: Tensor, spectrum: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """Left vectors cleared of the range of X outside the wanted right vectors.

    Where s is near 0, X v / s is rounding error and has no meaning.  Any unit vector that X^T sends to zero
    will do, so a random one takes its place, orthogonal to what X makes of every other right vector.
    """
    s_max = float(spectrum[0])
    null = s <= NULL * s_max
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(left.shape, generator=generator, dtype=torch.float64).to(left.device)
    left = torch.where(null, noise, left)
    # Below this an eigenvalue of G may be rounding error, and its inverse would be noise.
    strong = spectrum > 1e-6 * s_max
    right, inverse = vectors[:, strong], spectrum[strong].pow(-2).unsqueeze(1)
    small = s <= SMALL * s_max
    for _ in range(3):
        weak = left[:, small]
        weak = weak - X.times(right @ (inverse * (right.mT @ X.transposed_times(weak))))
        left[:, small] = weak / weak.norm(dim=0).clamp_min(1e-300)
        # QR keeps the leading columns, which are those with the larger s.
        Q, R = torch.linalg.qr(left)
        left = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return left


def _signs(V: Tensor) -> Tensor:
    """The (r,) factors of +-1 that make the entry of largest magnitude in each column of V positive.

    Entries within 1e-6 of the largest count as equal and the first one decides, lest the last bit should.
    """
    size = V.abs()
    first = (size >= (1 - 1e-6) * size.amax(dim=0)).to(torch.uint8).argmax(dim=0)
    return torch.where(V.gather(0, first.unsqueeze(0)).squeeze(0) < 0, -1.0, 1.0).to(V.dtype)
