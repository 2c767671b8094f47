"""What a vision-language model is made of, as numbers: the family-neutral configuration of the graphs.

Dimension letters used in the whole project:
    B batch, S sequence, K kept merged tokens, N merged tokens of the full grid, P positions whose logits are wanted,
    H, W image height and width in pixels, D width of the language model, V vocabulary, M cache capacity,
    L deepstack levels, T patches in the vision tower (K * merge**2), G windows of it that keep any, A axes of a
    position, C width of the vision tower, U kept tokens that are of the image and not of what was put around it,
    E entries of a cache that a run looks at
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower over patches of ``patch`` x ``patch`` pixels, ``merge`` x ``merge`` of which become one token."""

    depth: int  # transformer blocks
    width: int  # hidden size of the tower
    heads: int  # attention heads
    ffn: int  # inner width of the MLP
    patch: int  # pixels per patch side
    merge: int  # patches per merged-token side
    temporal_patch: int  # frames per patch; a still image is repeated
    out_width: int  # D of the language model
    positions: int = (
        0  # entries of the learned position table (a square grid, after the class token's); 0: none
    )
    deepstack: tuple[int, ...] = ()  # blocks whose output is merged and handed to the first language layers
    channels: int = 3
    patch_bias: bool = True
    norm: str = "layer"  # kind of norm, "layer" or "rms"
    norm_eps: float = 1e-6
    mlp: str = "gelu_tanh"  # "gelu_tanh", "gelu" and "quick_gelu" with one matrix into the MLP, "gated_silu" with two
    rope_theta: float = 10000.0
    window: int = 0  # side of the windows that patches attend within, in merged tokens; 0: they attend to all
    full_blocks: tuple[int, ...] = ()  # blocks in which they attend to all in spite of the windows
    side: int = 0  # pixels per side of every view; 0: views have any size
    class_token: bool = False  # a token of no patch goes first; what attention it pays the others scores them
    projector_bias: bool = True  # of the layers between such a tower and the decoder
    # height and width in pixels of the grids of views that an image may be shown in, besides the whole; none: only that
    pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def block(self) -> int:
        """Pixels per side of a merged token."""
        return self.patch * self.merge


# of a model without a tower; a block of its patches is as large as with others, so that default sizes are possible ones
NO_TOWER = VisionConfig(depth=0, width=0, heads=1, ffn=0, patch=32, merge=1, temporal_patch=1, out_width=0)


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched for long sequences (YaRN, Peng et al. 2023, arXiv:2309.00071)."""

    factor: float  # how many times longer the sequences may be
    original_context: int  # of the training
    attention_factor: float  # cos and sin are multiplied by it
    beta_fast: float = 32.0  # turns within ``original_context`` from which on a frequency stays as it is
    beta_slow: float = 1.0  # turns up to which a frequency is divided by ``factor``
    truncate: bool = True  # the ramp between them starts and ends at whole frequencies


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a decoder: which values of a head turn, and with which axis of the position."""

    theta: float
    sections: tuple[int, ...]  # rotary frequencies of each axis; they sum to half of ``width``
    width: int  # values of a head that are turned, the first ones; the others stay as they are
    interleaved: bool = (
        False  # axes take turns from frequency to frequency; False: a block of frequencies for each
    )
    yarn: Yarn | None = None  # frequencies for longer sequences than the model was trained for


@dataclass(frozen=True)
class State:
    """An input of the decoder that it gives back changed: what a sequence remembers of the tokens before."""

    name: str
    # "slots": sequences, always the first axis; "M": tokens, an entry for each, if there is one
    shape: tuple[int | str, ...]
    dtype: str = "compute"  # what the graph calculates in; or "float32", whatever it does
    rewindable: bool = True  # can a sequence be cut back to a shorter one, with entries left as they are?

    @property
    def by_token(self) -> bool:
        """Does it hold an entry for every token?"""
        return "M" in self.shape

    def stored(self, computed: str) -> str:
        """The dtype that it has where the graph calculates in ``computed``, both as in dtype.BY_NAME."""
        return computed if self.dtype == "compute" else self.dtype

    def sized(self, slots: int, capacity: int) -> tuple[int, ...]:
        """The shape for so many sequences and tokens."""
        sizes = {"slots": slots, "M": capacity}
        return tuple(sizes[n] if isinstance(n, str) else n for n in self.shape)


@dataclass(frozen=True)
class Output:
    """What a vision graph gives besides the features."""

    name: str
    shape: tuple[int | str, ...]  # "U": an entry for each token
    dtype: str = "compute"  # what the graph calculates in; or "float32", whatever it does


DELTA_CHUNK = 64  # tokens of the gated delta rule that are calculated together, where no operator has it


@dataclass(frozen=True)
class DeltaNet:
    """Layers of linear attention by the gated delta rule: what they remember of a sequence has one size.

    Source: Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464.
    """

    layers: tuple[int, ...]  # which ones, rising; the others have attention
    key_heads: int
    value_heads: int  # a multiple of the key heads
    key_dim: int  # width of a key head
    value_dim: int
    kernel: int  # tokens that the convolution over queries, keys and values sees

    @property
    def channels(self) -> int:
        """Width of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class TextConfig:
    """Decoder with grouped-query attention and rotary positions, and perhaps other layers between."""

    layers: int
    width: int  # D
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # V
    norm_eps: float
    rope: Rope
    context: int  # longest sequence the checkpoint was made for
    tied_head: bool  # the output head is the embedding table
    qkv_bias: bool = False
    qk_norm: bool = True  # queries and keys are normalised before they are turned
    # what a head of attention puts out is multiplied by a gate, computed beside its queries
    gated: bool = False
    norm_offset: bool = False  # norms multiply by 1 + weight
    delta: DeltaNet | None = None

    def states(self) -> tuple[State, ...]:
        """Of every layer keys and values (key_0, value_0), or what linear attention remembers (conv_1, recurrent_1)."""
        found: list[State] = []
        for i in range(self.layers):
            if self.delta is not None and i in self.delta.layers:
                d = self.delta
                found.append(State(f"conv_{i}", ("slots", d.kernel - 1, d.channels), rewindable=False))
                shape: tuple[int | str, ...] = ("slots", d.value_heads, d.key_dim, d.value_dim)
                found.append(State(f"recurrent_{i}", shape, "float32", rewindable=False))
            else:
                cache = ("slots", self.kv_heads, "M", self.head_dim)
                found += [State(f"key_{i}", cache), State(f"value_{i}", cache)]
        return tuple(found)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: the vision tower, the decoder and the token ids that tie them together."""

    family: str  # Hugging Face ``model_type``
    tower: str  # its architecture: a file of exporters/towers; "": it has none (NO_TOWER) and takes text only
    decoder: str  # likewise of exporters/decoders
    vision: VisionConfig
    text: TextConfig
    states: tuple[State, ...]  # of the decoder
    image_token: int  # placeholder, one per merged token of the full grid; -1 where there is none
    eos_tokens: tuple[int, ...]  # used where generation_config.json is absent

    @property
    def sees(self) -> bool:
        """Does it take images?"""
        return bool(self.tower)

    @property
    def graphs(self) -> tuple[str, ...]:
        """What a request runs, in that order; a graph of its bundle each."""
        return ("prune", "vision", "language") if self.sees else ("language",)

    @property
    def with_weights(self) -> tuple[str, ...]:
        """Those of the graphs that have weights."""
        return tuple(graph for graph in self.graphs if graph != "prune")

    @property
    def axes(self) -> int:
        """A, the axes of a position."""
        return len(self.text.rope.sections)

    @property
    def levels(self) -> int:
        """L, what the vision tower gives besides the embeddings."""
        return len(self.vision.deepstack)

    @property
    def other_outputs(self) -> tuple[Output, ...]:
        """What the vision graph gives besides the features."""
        c = self.vision
        if not c.class_token:
            return ()
        found = (
            Output("hidden", ("U", c.width)),
            Output("score", ("U",), "float32"),
            Output("class_feature", (1, 1, c.out_width)),
        )
        return (*found, Output("newline", (1, 1, c.out_width))) if c.pinpoints else found


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the uint8 array that the graphs take."""

    min_pixels: int  # the resized image has at least this many pixels
    max_pixels: int  # and at most this many
    mean: tuple[float, float, float]  # on pixels in [0, 1]
    std: tuple[float, float, float]
    # of towers with views of one size: pixels of the shorter side, whose middle is then cut out; 0: both get the view's
    shortest_edge: int = 0
    pad_to_square: bool = False  # first, with the mean colour


@dataclass(frozen=True)
class Weight:
    """Where an initializer of a graph comes from in the checkpoint, and how it is laid out there.

    ``layout`` is ``"same"``, ``"one_plus"`` (used as 1 + what is stored), ``"transpose"`` (a linear layer stored
    [out, in], used as [in, out]) or ``"patch"``
    (a kernel [C, 3, F, p, p] or [C, 3, p, p], used as [p * p * 3, C]: the frames are summed, a still image repeats
    itself).
    """

    source: str  # tensor name in the checkpoint
    shape: tuple[int, ...]  # shape in the checkpoint
    layout: str = "same"
    integers: bool = True  # may it be stored in integers, if it is a matrix?
