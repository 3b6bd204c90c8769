"""Small nets around one unusual layer or one unusual way of writing, as research code has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --- weights that are made ------------------------------------------------------------------------------------------


class Ste(torch.autograd.Function):
    """Sign forwards, identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Ste.apply(self.first(x)))


class Binary(nn.Module):
    """Weights of one bit with a scale, `w + (q(w) - w).detach()`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.first.weight
        hard = w.sign() * w.abs().mean(dim=1, keepdim=True)
        return self.second(F.relu(F.linear(x, w + (hard - w).detach(), self.first.bias)))


class Codebook(nn.Module):
    """A vector-quantised auto-encoder: the nearest of learned rows, straight through; the losses are outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.codes = nn.Linear(8, 4), nn.Linear(4, 8), nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        q = self.codes(torch.cdist(z, self.codes.weight).argmin(dim=-1))
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.decoder(z + (q - z).detach()), loss


class HyperNet(nn.Module):
    """A net whose weights another net makes of a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8 * 4 + 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        made = self.make(task)
        w, b = made[:, :32].view(-1, 4, 8), made[:, 32:]
        return self.head(F.relu(torch.bmm(w, x[..., None]).squeeze(-1) + b))


class Parametrized(nn.Module):
    """torch's own reparametrisations, the new and the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 4, 3, padding=1))
        self.old = nn.utils.weight_norm(nn.Linear(32, 8))
        self.turned = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.spectral(x))
        return self.turned(F.relu(self.old(self.normed(x[:, None]).flatten(1))))


class Masked(nn.Module):
    """MADE and pruning: weights times a buffer of zeros and ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8, 8).tril(-1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.first.weight * self.mask, self.first.bias))
        return F.linear(x, self.second.weight * self.mask, self.second.bias)


class Cosine(nn.Module):
    """A classifier on the sphere, with a margin's scale; a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8))
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.body(x)), F.normalize(self.weight)) / self.temperature


class LoRA(nn.Module):
    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(rank, 8)), nn.Parameter(torch.zeros(8, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.T @ self.b.T) * (16 / self.a.shape[0])


# --- experts and sets of nets ---------------------------------------------------------------------------------------


class StackedExperts(nn.Module):
    """Weights of separate layers put together in the forward pass; a dense mixture by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.stack([e.weight for e in self.experts])
        b = torch.stack([e.bias for e in self.experts])
        y = torch.einsum("btd,efd->btef", x, w) + b
        return torch.einsum("bte,btef->btf", self.gate(x).softmax(-1), y)


class TopExperts(nn.Module):
    """Two of four experts a token, dispatched by one-hot products as in GShard."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(8, experts, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(experts, 8, 16)), nn.Parameter(torch.randn(experts, 16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.router(x).softmax(-1)
        top, index = shares.topk(2, dim=-1)
        hot = F.one_hot(index, shares.shape[-1]).to(x.dtype)
        combine = (hot * (top / top.sum(-1, keepdim=True))[..., None]).sum(-2)
        h = F.gelu(torch.einsum("btd,edf->ebtf", x, self.w1))
        y = torch.einsum("ebtf,efd->ebtd", h, self.w2)
        balance = (hot.sum(-2).mean((0, 1)) * shares.mean((0, 1))).sum()
        return x + torch.einsum("bte,ebtd->btd", combine, y), balance


class Ensemble(nn.Module):
    """torch.vmap over stacked parameters."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(members, 6, 8)), nn.Parameter(torch.zeros(members, 6))
        self.w2 = nn.Parameter(torch.randn(members, 2, 6))

    def forward(self, x: Tensor) -> Tensor:
        def net(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
            return F.linear(torch.tanh(F.linear(x, w1, b1)), w2)

        return torch.vmap(net)(self.w1, self.b1, self.w2).mean(0)


class Pairs(nn.Module):
    """nn.Bilinear, nn.MultiheadAttention with its weights asked for, PReLU, nn.Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
        self.bilinear, self.act = nn.Bilinear(8, 8, 5), nn.PReLU(5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z, weights = self.attention(x, y, y)
        return self.act(self.bilinear(x + z, self.transformer(y, x)).transpose(1, 2)), weights


# --- sequences ------------------------------------------------------------------------------------------------------


class LanguageLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(11, 8), nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, state = self.lstm(self.embed(ids))
        return self.head(h), state


class Cells(nn.Module):
    """A loop over cells with attention to what was read, as in the first translators."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.cell = nn.GRU(6, 4, bidirectional=True, batch_first=True), nn.LSTMCell(14, 8)
        self.v, self.mix = nn.Parameter(torch.randn(8)), nn.Linear(16, 8)
        self.start, self.out = nn.Parameter(torch.zeros(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory, _ = self.read(x)
        h = self.start.expand(x.shape[0], -1)
        c, out = torch.zeros_like(h), []
        for t in range(3):
            query = h[:, None].expand_as(memory)
            score = torch.tanh(self.mix(torch.cat([memory, query], -1))) @ self.v
            context = (score.softmax(1)[..., None] * memory).sum(1)
            h, c = self.cell(torch.cat([x[:, t], context], -1), (h, c))
            out.append(self.out(h))
        return torch.stack(out, dim=1)


class Wave(nn.Module):
    """Dilated causal convolutions with gates, residuals and a sum of skips."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.filters = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3))
        self.residual, self.skip = (nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3)) for _ in range(2))
        self.last = nn.Conv1d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), 0
        for i, conv in enumerate(self.filters):
            a, b = conv(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            h = torch.tanh(a) * torch.sigmoid(b)
            skips = skips + self.skip[i](h)
            x = x + self.residual[i](h)
        return self.last(F.relu(skips))


class LongConv(nn.Module):
    """A diagonal state space as one long convolution by FFT (S4D), and Hyena's filter made by a net of the position."""

    def __init__(self, width: int = 4, state: int = 3, length: int = 16) -> None:
        super().__init__()
        self.log_dt, self.d = nn.Parameter(torch.full((width,), -2.0)), nn.Parameter(torch.randn(width))
        self.a_real, self.a_imag = nn.Parameter(torch.zeros(width, state)), nn.Parameter(torch.randn(width, state))
        self.c = nn.Parameter(torch.randn(width, state, 2))
        self.filter = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, width))
        self.mix, self.length = nn.Linear(width, width), length

    def forward(self, x: Tensor) -> Tensor:
        n = self.length
        a = torch.complex(-self.a_real.exp(), self.a_imag) * self.log_dt.exp()[:, None]
        steps = (a[..., None] * torch.arange(n)).exp()
        kernel = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(self.c) * (a.exp() - 1) / a, steps).real
        kernel = kernel + self.filter(torch.linspace(0, 1, n)[:, None]).T
        u = x.transpose(1, 2)
        y = torch.fft.irfft(torch.fft.rfft(u, 2 * n) * torch.fft.rfft(kernel, 2 * n), 2 * n)[..., :n]
        return self.mix(F.gelu(y + u * self.d[:, None]).transpose(1, 2))


class Queries(nn.Module):
    """Learned queries read the input, then what was asked reads them (Perceiver IO)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.latents, self.asked = nn.Parameter(torch.randn(4, width)), nn.Parameter(torch.randn(1, 3, width))
        self.q, self.kv, self.norm = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.LayerNorm(width)
        self.q2, self.kv2, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        latents = latents + F.scaled_dot_product_attention(self.q(self.norm(latents)), *self.kv(x).chunk(2, -1))
        asked = self.asked.expand(x.shape[0], -1, -1)
        return self.out(F.scaled_dot_product_attention(self.q2(asked), *self.kv2(latents).chunk(2, -1)))


class LinearAttention(nn.Module):
    """Feature maps instead of a softmax, causal by running sums."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.cumsum(k[..., :, None] * v[..., None, :], dim=1)
        y = torch.einsum("btd,btde->bte", q, state) / (torch.einsum("btd,btd->bt", q, k.cumsum(1)) + 1e-6)[..., None]
        return x + self.out(y)


# --- spectra --------------------------------------------------------------------------------------------------------


class Fourier(nn.Module):
    """FNet's mixing; GFNet's global filter; AFNO's blocks with shrinkage; FNO's complex parameters."""

    def __init__(self, width: int = 8, side: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, width), blocks
        self.filter = nn.Parameter(torch.randn(side, side // 2 + 1, width, 2) * 0.02)
        size = width // blocks
        self.w, self.b = nn.Parameter(torch.randn(2, blocks, size, size)), nn.Parameter(torch.zeros(2, blocks, size))
        self.modes = nn.Parameter(torch.randn(width, width, 3, 3, dtype=torch.cfloat))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(width) for _ in range(4)), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.fft.fft2(self.norms[0](x), dim=(1, 2)).real / x.shape[1]
        z = torch.fft.rfft2(self.norms[1](x), dim=(1, 2), norm="ortho")
        x = x + torch.fft.irfft2(z * torch.view_as_complex(self.filter), s=x.shape[1:3], dim=(1, 2), norm="ortho")
        z = torch.fft.rfft2(self.norms[2](x), dim=(1, 2), norm="ortho")
        z = z.view(*z.shape[:3], self.blocks, -1)
        real = torch.einsum("...bi,bio->...bo", z.real, self.w[0]) - torch.einsum("...bi,bio->...bo", z.imag, self.w[1])
        imag = torch.einsum("...bi,bio->...bo", z.imag, self.w[0]) + torch.einsum("...bi,bio->...bo", z.real, self.w[1])
        shrunk = F.softshrink(torch.stack([real + self.b[0], imag + self.b[1]], dim=-1), 0.01)
        z = torch.view_as_complex(shrunk).flatten(3)
        x = x + torch.fft.irfft2(z, s=x.shape[1:3], dim=(1, 2), norm="ortho")
        z = torch.fft.rfft2(self.norms[3](x).permute(0, 3, 1, 2), norm="ortho")
        out = torch.zeros_like(z)
        out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", z[:, :, :3, :3], self.modes)
        x = x + torch.fft.irfft2(out, s=x.shape[1:3], norm="ortho").permute(0, 2, 3, 1)
        return self.head(x.mean((1, 2)))


# --- densities ------------------------------------------------------------------------------------------------------


class Flow(nn.Module):
    """Affine couplings, an invertible matrix and the logarithm of its determinant."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.matrix = nn.Parameter(torch.linalg.qr(torch.randn(width, width)).Q)
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(width // 2, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x + self.shift) * self.log_scale.exp()
        log_det = self.log_scale.sum().expand(x.shape[0]) + torch.linalg.slogdet(self.matrix).logabsdet
        x = x @ self.matrix
        for net in self.nets:
            a, b = x.chunk(2, dim=-1)
            s, t = net(a).chunk(2, dim=-1)
            s = torch.tanh(s)
            x, log_det = torch.cat([b * s.exp() + t, a], dim=-1), log_det + s.sum(-1)
        return x, log_det


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 16), nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 8))
        self.mean, self.log_var = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.elu(self.encoder(x))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1)
        return {"reconstruction": self.decoder(z), "kl": kl.mean()}


class MixtureDensity(nn.Module):
    """Returns a distribution of torch.distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        logits, mean, scale = self.out(torch.tanh(self.body(x))).chunk(3, dim=-1)
        parts = torch.distributions.Normal(mean, F.softplus(scale) + 1e-3)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), parts)


class LossInside(nn.Module):
    """The only output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.head(self.norm(self.embed(batch["ids"])))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


# --- control flow and state -----------------------------------------------------------------------------------------


class RungeKutta(nn.Module):
    """One function applied eight times, as an ODE net."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.read = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = 0.1
        for _ in range(2):
            k1 = self.f(x)
            k2 = self.f(x + h / 2 * k1)
            k3 = self.f(x + h / 2 * k2)
            k4 = self.f(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.read(x)


class Bootstrap(nn.Module):
    """Two views, a predictor, a target that is a buffer copy and gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predictor = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 8)
        self.register_buffer("target", torch.randn(8, 8))

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        p = F.normalize(self.predictor(self.online(a)), dim=-1)
        with torch.no_grad():
            t = F.normalize(F.linear(b, self.target), dim=-1)
        return {"loss": (2 - 2 * (p * t).sum(-1)).mean(), "views": {"a": p, "b": [t]}}


class Kan(nn.Module):
    """Learned functions on edges: hat functions on a grid times coefficients, and a base branch."""

    def __init__(self, into: int = 4, out: int = 5, grid: int = 6) -> None:
        super().__init__()
        self.base, self.spline = nn.Parameter(torch.randn(out, into)), nn.Parameter(torch.randn(out, into, grid))
        self.scaler = nn.Parameter(torch.ones(out, into))
        self.register_buffer("grid", torch.linspace(-1, 1, grid))

    def forward(self, x: Tensor) -> Tensor:
        hats = F.relu(1 - (x[..., None] - self.grid).abs() * 2.5)
        weight = self.spline * self.scaler[..., None]
        return F.linear(F.silu(x), self.base) + F.linear(hats.flatten(1), weight.flatten(1))


class Deformable(nn.Module):
    """Offsets from a convolution move the places where features are read."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.offset = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        base = F.affine_grid(torch.eye(2, 3).expand(x.shape[0], -1, -1), list(x.shape), align_corners=False)
        grid = base + self.offset(x).tanh().permute(0, 2, 3, 1) * 0.1
        return F.pixel_shuffle(self.out(F.grid_sample(x, grid, align_corners=False)), 2)


class Capsules(nn.Module):
    """Votes of capsules, routed by agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("bid,icde->bice", x, self.w)
        logits = torch.zeros(votes.shape[:3])
        for _ in range(2):
            s = (logits.softmax(dim=2)[..., None] * votes).sum(1)
            norm = s.square().sum(-1, keepdim=True)
            v = s * norm / (1 + norm) / (norm + 1e-8).sqrt()
            logits = logits + (votes * v[:, None]).sum(-1)
        return v.norm(dim=-1)
