"""The r singular triplets of one part of a weight's spectrum, in float64, with a certificate.

What.  W (m, n) = U diag(s) V^T; `singular_triplets` returns r columns of U and V and their s, chosen by
`mode`: the smallest ("min", what MiLoRA adapts), the largest ("max"), the middle, or a random draw.

How.  X is W or its transpose, with p rows >= q columns.  The eigenvectors of the Gram matrix G = X^T X are
the right vectors of X, and G is (q, q) whatever p is.  One Rayleigh-Ritz step in X itself (a QR of X V and
the SVD of its small factor) then gives s and U from the weight, not from its square.

Precision.  float64 throughout: a checkpoint's bfloat16, float16 or float32 is upcast exactly, and the squared
condition number of G costs digits that float64 has (s is good to about eps * s_max^2 / (2 s)).  A float32 SVD
is not an alternative: its error is relative to the largest singular value, which in a language model is 10^4
to 10^6 times the smallest.

Cost.  p q^2 operations for G and 9 q^3 for its eigenvectors; 3 q^2 float64 numbers of memory, since X is
upcast one block of rows at a time.

Failure.  Every result is measured against W (`Certificate`).  Where squaring lost the wanted end, the answer
comes from a full float64 SVD instead, which holds a float64 copy of W; the certificate says which path ran
and why.

Sources: MiLoRA, https://arxiv.org/abs/2406.09044.  Perturbation of singular subspaces: P.-A. Wedin (1972),
https://doi.org/10.1007/BF01932678.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from milora_init import dense, krylov

Mode = Literal["min", "max", "mid", "random"]

EPS = torch.finfo(torch.float64).eps
TINY = 1e-200  # against division by zero; X is scaled, so only a zero matrix has an s_max below 1/2
BLOCK_BYTES = 64 * 2**20  # of X, upcast at a time
KRYLOV_FROM = 512  # the smallest q for which a Krylov space beats all eigenvectors
KRYLOV_BLOCK = 48  # MKL multiplies by 48 columns faster than by 32, and by 96 than by 64
ANGLES = (2e-7, 1e-9)  # where the Krylov loop stops, and where it stops if that was not enough
SHIFT = 0.9  # of the smallest eigenvalue of X^T X
ERROR_LIMIT = 5e-8  # a component error above this sends the solve to the next path
BACKWARD_LIMIT = 1e-13  # the residual, relative to s_max, of a result that float64 cannot improve
CLUSTER_GAP = 1e-6  # below this gap the component is not unique, and the backward error is judged instead


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is known about a result, measured against W in float64.

    gap is the distance from the wanted singular values to the nearest unwanted one, relative to the larger of
    the two; inf where nothing is unwanted (r = q).

    component_error estimates ||D - D_true||_F / ||D||_F for D = U diag(s) V^T.  To first order a triplet
    with residuals a = ||X v - s u|| and b = ||X^T u - s v|| leans on an unwanted triplet s_j by an angle of
    at most sqrt(a^2 + b^2) / |s_j - s|, and D moves by s times that; the r moves add in squares.
    Where the cut falls in a cluster (gap near 0) it is large or inf: the component is not unique, and what
    holds is the residual, by which D is exactly a component of a matrix that close to W.  ||D||_F is replaced
    by q * eps * s_max * sqrt(r) where D is below that, the resolution of float64.
    """

    path: str  # the algorithm: "eigh" or "svd"
    reason: str  # why that one
    residual: float  # max over the triplets of max(||X v - s u||, ||X^T u - s v||) / s_max
    orthogonality: float  # max(||U^T U - I||_max, ||V^T V - I||_max)
    gap: float
    component_error: float
    complete: str  # the evidence that no wanted triplet was missed


@dataclass(frozen=True, slots=True)
class Triplets:
    """U (m, r), s (r,) descending, V (n, r), all float64 on the device of W; s_max the largest of all."""

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


def singular_triplets(W: Tensor, r: int, *, mode: Mode = "min", seed: int = 0) -> Triplets:
    """The r singular triplets of W (m, n) that `mode` names, s descending, with a certificate.

    W may be of any floating dtype, on any device; one without float64 is served by the CPU.  In every column
    of V the entry of largest magnitude is positive.  `seed` draws the indices of mode "random" and the
    completion of U where s is zero.

    Raises ValueError if W is not a floating matrix, has NaN or Inf, or r is not in 1..min(m, n).
    """
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}, expected a floating-point matrix")
    q = min(W.shape)
    if not 1 <= r <= q:
        raise ValueError(f"r is {r}, expected 1 to {q} for a matrix of shape {tuple(W.shape)}")
    home = W.device
    W = W.detach()
    if home.type == "mps":
        W = W.cpu()
    low, high = (float(x) for x in torch.aminmax(W))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"W of shape {tuple(W.shape)} has NaN or Inf entries")
    wanted = wanted_indices(q, r, mode, seed).to(W.device)

    wide = W.shape[0] < W.shape[1]
    # A power of two brings the entries near 1, exactly, so that no square over- or underflows.
    exponent = math.frexp(max(-low, high))[1]
    X = Scaled(W.mT if wide else W, exponent)

    left, s, right, s_max, certificate = _solve(X, wanted, mode, seed)
    U, V = (right, left) if wide else (left, right)
    sign = _signs(V)
    unit = math.ldexp(1.0, exponent)
    return Triplets((U * sign).to(home), (s * unit).to(home), (V * sign).to(home), s_max * unit, certificate)


@dataclass(frozen=True, slots=True)
class Scaled:
    """X * 2^-exponent (p, q) in float64, read a block of rows at a time and never held whole."""

    X: Tensor
    exponent: int

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        p, q = self.X.shape
        step = max(1, BLOCK_BYTES // (8 * q))
        for start in range(0, p, step):
            rows = slice(start, min(p, start + step))
            # Two factors, for 2^1074 is no float64.
            half = self.exponent // 2
            block = self._upcast(rows)
            yield rows, block.mul_(math.ldexp(1.0, -half)).mul_(math.ldexp(1.0, half - self.exponent))

    def _upcast(self, rows: slice) -> Tensor:
        block = self.X[rows]
        if block.stride(0) < block.stride(1):  # a wide W, seen transposed: convert along its own rows
            return block.mT.to(torch.float64, copy=True).mT
        return block.to(torch.float64, copy=True)

    def times(self, V: Tensor) -> Tensor:
        """X V (p, k) for V (q, k)."""
        padded = _pad(V)
        out = V.new_empty(self.X.shape[0], V.shape[1])
        for rows, block in self.blocks():
            out[rows] = (block @ padded)[:, : V.shape[1]]
        return out

    def transposed_times(self, U: Tensor) -> Tensor:
        """X^T U (q, k) for U (p, k)."""
        padded = _pad(U)
        out = U.new_zeros(self.X.shape[1], padded.shape[1])
        for rows, block in self.blocks():
            out.addmm_(block.mT, padded[rows])
        return out[:, : U.shape[1]].contiguous()

    def whole(self) -> Tensor:
        """X itself, in float64."""
        out = torch.empty(self.X.shape, dtype=torch.float64, device=self.X.device)
        for rows, block in self.blocks():
            out[rows] = block
        return out

    def normal_operator(self) -> dense.Operator:
        """V -> X^T X V.  X is kept in float64 where that takes no more than 3 q^2 numbers."""
        p, q = self.X.shape
        if p <= 3 * q:
            full = self.whole()
            return lambda V: full.mT @ (full @ V)

        def apply(V: Tensor) -> Tensor:
            out = torch.zeros_like(V)
            for _, block in self.blocks():
                out.addmm_(block.mT, block @ V)
            return out

        return apply

    def gram(self) -> Tensor:
        """X^T X (q, q), its lower triangle only: what lies above is not filled in."""
        q = self.X.shape[1]
        G = torch.zeros(q, q, dtype=torch.float64, device=self.X.device)
        width = 384  # a multiple of the 24 columns that MKL multiplies at a time
        for _, block in self.blocks():
            for start in range(0, q, width):
                stop = min(q, start + width)
                G[start:, start:stop].addmm_(block[:, start:].mT, block[:, start:stop])
        return G


def _pad(V: Tensor) -> Tensor:
    """V with zero columns up to a multiple of 24: MKL takes twice as long for 64 columns as for 72."""
    return torch.nn.functional.pad(V, (0, -V.shape[1] % 24))


_Solution = tuple[Tensor, Tensor, Tensor, float, Certificate]


def _solve(X: Scaled, wanted: Tensor, mode: Mode, seed: int) -> _Solution:
    """Left (p, r), s (r,), right (q, r), s_max and the certificate, by the first path that is good enough."""
    q, r = X.X.shape[1], wanted.numel()
    if mode not in ("min", "max"):
        doubt = f"mode {mode} needs interior triplets"
    elif q < KRYLOV_FROM or r > q // 8:
        doubt = f"r = {r} of q = {q} is beyond a Krylov space"
    else:
        found, doubt = _by_lanczos(X, wanted, mode)
        if found is not None:
            return found
    solution = _by_eigh(X, wanted, seed, doubt)
    if _is_good(solution):
        return solution
    error = f"eigh left a component error of {solution[4].component_error:.1e}"
    return _by_svd(X, wanted, f"{doubt}; {error}")


def _is_good(solution: _Solution) -> bool:
    _, s, _, s_max, certificate = solution
    negligible = float(s[0]) <= BACKWARD_LIMIT * s_max
    if not math.isfinite(certificate.residual) or certificate.orthogonality > 1e-10:
        return False
    if certificate.component_error <= ERROR_LIMIT:
        return True
    # No path can do better where the component is not unique, or is itself rounding error.
    return (certificate.gap < CLUSTER_GAP or negligible) and certificate.residual <= BACKWARD_LIMIT


def _by_lanczos(X: Scaled, wanted: Tensor, mode: Mode) -> tuple[_Solution | None, str]:
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
    max_basis = min(3 * q // 4, 16 * r + 768)
    doubt = ""
    for angle in ANGLES:
        ritz = krylov.largest(apply, q, r, block=KRYLOV_BLOCK, max_basis=max_basis, tolerance=angle, device=X.X.device)
        if isinstance(ritz, str):
            return None, ritz
        if not ritz.probe < float(ritz.values[-1]):
            return None, "an independent block found what the Krylov space had missed"
        left, s, right, image = rayleigh_ritz(X, ritz.basis)
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
            reason=f"r = {r} of q = {q}, {ritz.steps} steps of {KRYLOV_BLOCK}",
            complete="an independent block found nothing beyond the cut",
            inverse=None if factor is None else factor.solve,
        )
        solution = left, s, right, s_max, certificate
        if _is_good(solution):
            return solution, ""
        doubt = f"lanczos left a component error of {certificate.component_error:.1e}"
    return None, doubt


def _factor(X: Scaled) -> tuple[dense.Cholesky | None, float]:
    """The Cholesky factor of X^T X - shift I, and the shift.

    The spectrum of a clearly rectangular matrix does not reach down to zero, and a shift just below its
    smallest eigenvalue takes a third off the number of Krylov steps.  A rough, float32 eigenvalue will do:
    that the shifted matrix has a Cholesky factor is the proof that the shift is below the spectrum.
    """
    p, q = X.X.shape
    G = X.gram()
    if 2 * p >= 3 * q:
        rough = dense.cholesky(G.to(torch.float32))
        if rough is not None:
            shift = SHIFT / krylov.rough_largest(rough.solve, q, block=KRYLOV_BLOCK, device=G.device)
            del rough
            shifted = G.clone()
            shifted.diagonal().sub_(shift)
            factor = dense.cholesky(shifted) if shift > 0 else None
            if factor is not None:
                return factor, shift
    return dense.cholesky(G), 0.0


def _largest(factor: dense.Cholesky) -> float:
    """The largest eigenvalue of the factored matrix, from below, to about a percent: only a scale."""
    q = factor.L.shape[0]
    block = torch.randn(q, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = block.to(factor.L.device)
    for _ in range(2):
        block, _ = krylov.orthonormalise(factor.times(block))
    return float(torch.linalg.matrix_norm(block.mT @ factor.times(block), ord=2))


def _by_eigh(X: Scaled, wanted: Tensor, seed: int, reason: str) -> _Solution:
    eigenvalues, vectors = dense.eigh(X.gram())
    spectrum = eigenvalues.clamp_(min=0).sqrt_().flip(0)
    vectors = vectors.flip(1)
    left, s, right, image = rayleigh_ritz(X, vectors[:, wanted])
    s_max = max(float(spectrum[0]), float(s[0]))
    if bool((s <= math.sqrt(EPS) * s_max).any()):
        left = _purify(X, left, s, spectrum, vectors, seed)
    spectrum[wanted] = s
    certificate = certify(X, left, s, right, image, _gaps(spectrum, wanted), s_max, "eigh", reason, "all computed")
    return left, s, right, s_max, certificate


def _by_svd(X: Scaled, wanted: Tensor, reason: str) -> _Solution:
    full = X.whole()
    left, spectrum, right = dense.svd(full)
    del full
    left, s, right = left[:, wanted], spectrum[wanted], right.mT[:, wanted]
    s_max = float(spectrum[0])
    certificate = certify(
        X, left, s, right, X.times(right), _gaps(spectrum, wanted), s_max, "svd", reason, "all computed"
    )
    return left, s, right, s_max, certificate


def rayleigh_ritz(X: Scaled, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets of X within an orthonormal basis (q, k): left (p, k), s, right (q, k), X right."""
    image = X.times(basis)
    Q, R = dense.qr(image)
    u, s, vh = dense.svd(R)
    return Q @ u, s, basis @ vh.mT, image @ vh.mT


def _purify(X: Scaled, left: Tensor, s: Tensor, spectrum: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """Left vectors cleared of the range of X outside the wanted right vectors.

    Where s is near 0, X v / s is rounding error and has no meaning.  Any unit vector that X^T sends to zero
    will do, so a random one takes its place, orthogonal to what X makes of every other right vector.
    """
    s_max = float(spectrum[0])
    null = s <= 100 * EPS * s_max
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(left.shape, generator=generator, dtype=torch.float64).to(left.device)
    left = torch.where(null, noise, left)
    # Below this an eigenvalue of G may be rounding error, and its inverse would be noise.
    strong = spectrum > 1e-6 * s_max
    right, inverse = vectors[:, strong], spectrum[strong].pow(-2).unsqueeze(1)
    small = s <= math.sqrt(EPS) * s_max
    for _ in range(3):
        weak = left[:, small]
        weak = weak - X.times(right @ (inverse * (right.mT @ X.transposed_times(weak))))
        left[:, small] = weak / weak.norm(dim=0).clamp_min(1e-300)
        # QR keeps the leading columns, which are those with the larger s.
        Q, R = dense.qr(left)
        left = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return left


def _gaps(spectrum: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each wanted value of a descending spectrum, the nearest unwanted one and the distance to it."""
    unwanted = torch.ones_like(spectrum, dtype=torch.bool)
    unwanted[wanted] = False
    others = spectrum[unwanted]
    s = spectrum[wanted]
    if others.numel() == 0:
        return s, torch.full_like(s, math.inf)
    nearest = (s.unsqueeze(1) - others).abs().min(dim=1)
    return others[nearest.indices], nearest.values


def certify(
    X: Scaled,
    left: Tensor,
    s: Tensor,
    right: Tensor,
    image: Tensor,
    gaps: tuple[Tensor, Tensor],
    s_max: float,
    path: str,
    reason: str,
    complete: str,
    inverse: dense.Operator | None = None,
) -> Certificate:
    """Measure left (p, r), s (r,), right (q, r) against X; image is X right, gaps as from `_gaps`.

    Where the inverse of X^T X is at hand and the wanted end is the smallest, it weighs the residual b.  Most
    of b is rounding error along the largest singular vectors, where it does no harm: the part along s_j moves
    D by s b_j sqrt(s_j^2 + s^2) / (s_j^2 - s^2), which is b_j / s_j times a factor that falls with s_j.
    """
    a = (image - left * s).norm(dim=0)
    lean_on = X.transposed_times(left) - right * s
    b = lean_on.norm(dim=0)
    nearest, distance = gaps
    identity = torch.eye(s.numel(), dtype=s.dtype, device=s.device)
    orthogonality = max(float((Q.mT @ Q - identity).abs().max()) for Q in (left, right))
    scale = max(s_max, TINY)
    larger = torch.maximum(s, nearest).clamp_min(TINY)
    lean = (s / distance.clamp_min(TINY)).clamp_min(1.0)
    moved_by_b = b * lean
    if inverse is not None:
        outside = lean_on - right @ (right.mT @ lean_on)
        weighed = (outside * inverse(outside)).sum(dim=0).clamp_min(0).sqrt()
        factor = nearest * torch.hypot(nearest, s) / (distance * (nearest + s)).clamp_min(TINY)
        moved_by_b = torch.minimum(moved_by_b, s * weighed * factor)
    moved = float(torch.hypot(a * lean, moved_by_b).norm())
    resolution = X.X.shape[1] * EPS * scale * math.sqrt(s.numel())
    return Certificate(
        path=path,
        reason=reason,
        residual=float(torch.maximum(a, b).max()) / scale,
        orthogonality=orthogonality,
        gap=float((distance / larger).min()),
        component_error=moved / max(float(s.norm()), resolution),
        complete=complete,
    )


def _signs(V: Tensor) -> Tensor:
    """The (r,) factors of +-1 that make the entry of largest magnitude in each column of V positive.

    Entries within 1e-6 of the largest count as equal and the first one decides, lest the last bit should.
    """
    size = V.abs()
    first = (size >= (1 - 1e-6) * size.amax(dim=0)).to(torch.uint8).argmax(dim=0)
    return torch.where(V.gather(0, first.unsqueeze(0)).squeeze(0) < 0, -1.0, 1.0).to(V.dtype)
