"""The sections of a recipe and their fields.

Each field is documented here and nowhere else. All of a recipe but `[runtime]`, `[network]`
and `[tracking]` is part of the run's fingerprint: `[runtime]` may change how fast a run is, never
what it computes, `[network]` who can take part, which the journal records, and `[tracking]` who is
told.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from meerkat.config.parts import Choice, Count, Neutral, Positive, Section, Seed

__all__ = [
    "Evaluation",
    "Federation",
    "MaskSection",
    "ModelSection",
    "Network",
    "Noise",
    "Optimizer",
    "Partition",
    "Runtime",
    "Selection",
    "TaskSection",
    "Tracking",
]


class ModelSection(Section):
    name: str
    """Hub id, folder, `.gguf` file, `demo:gemma-3-270m`, `demo:smollm2-135m`, or for images
    `demo:efficientnet-lite0`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the model's weights and activations; θ is float32 in either case."""


class MaskSection(Section):
    kind: Literal["sensitivity", "task", "magnitude", "random", "full", "union", "lora"] = (
        "sensitivity"
    )
    """How the mask is found: pre-training gradients (the method), gradients of the task's loss on
    the clients' labelled examples (an oracle: no server has these), weight magnitude, uniformly at
    random, every eligible parameter, or the union of masks from the clients' own data. `lora`: the
    weights stay, and all LoRA factors beside them move (extra `lora`); `density` says nothing."""
    density: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Share u of the eligible parameters that may move."""
    score: Literal["mean_square", "squared_mean"] = "mean_square"
    """Average of squared gradients (the paper), or square of the averaged gradient."""
    scope: Literal["global", "tensor"] = "global"
    """One top-n over all eligible tensors, or the top share u inside each tensor."""
    include: tuple[str, ...] = ()
    """Globs of parameter names; empty means the weight matrices of the decoder blocks."""
    exclude: tuple[str, ...] = ()
    """Globs of parameter names to leave out of what `include` gives."""
    first_block: Annotated[int, Field(ge=0, lt=2**16), Neutral(0)] = 0
    """The first decoder block with parameters that may move. What the blocks below it make of a
    batch is computed once (`runtime.prefix_cache`)."""
    corpus: str | tuple[str, ...] = "demo"
    """`demo` (or one half of it: `demo:speeches`, `demo:plots`), a hub id, or text files, for
    calibration; of a task over images `demo`, image files, or folders of images."""
    corpus_config: str | None = None
    """Configuration of a hub corpus, such as `en` for `allenai/c4`."""
    corpus_split: str = "train"
    """Split of a hub corpus."""
    corpus_column: str = "text"
    """Column of a hub corpus that holds the text."""
    batches: Count = 24
    """Calibration batches B; of a task mask fewer where the clients hold fewer examples."""
    batch_size: Count = 8
    """Sequences or images, or with `kind = "task"` examples, in a calibration batch."""
    sequence_length: Annotated[int, Field(ge=2, lt=2**20)] = 128
    """Tokens of a calibration sequence."""
    seed: Seed = 0
    """Order of the corpus or of the examples, the random mask, and the first LoRA factors."""
    lora_rank: Annotated[int, Field(ge=1, lt=2**12), Neutral(8)] = 8
    """`lora`: rank r of the factors of each weight, B (out, r) and A (r, in)."""
    lora_alpha: Annotated[Positive, Neutral(16.0)] = 16.0
    """`lora`: α; a weight becomes W + (α/r) B A."""
    file: str | None = None
    """A mask file to use instead of calibrating; it must have been made for this model."""


class SubspaceSection(Section):
    """Where θ may move within the mask (method.md section 9)."""

    kind: Literal["aligned", "random", "none"] = "aligned"
    """Directions that the model's own answers to public texts depend on, or random ones; `none` is
    as if there were no such section."""
    dimensions: Count = 32
    """Directions k."""
    texts: Count = 256
    """Public texts N, each of which takes one backward pass."""
    corpus: str | tuple[str, ...] | None = None
    """Where they come from, if not from `mask.corpus`; `model`: the model writes them itself."""
    score: Literal["auto", "difference", "sampled", "uniform", "mixed"] = "auto"
    """Whose gradient a text gives: the difference of two answers' scores (`auto` where there are
    two), the log-probability of an answer that the model or a die draws (`sampled`, `uniform`), or
    a random combination of all answers' scores (`mixed`, `auto` where there are more)."""
    answer_tokens: Count = 16
    """Most tokens of an answer that the model draws, in a task of free text."""
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """δ, as a share of the largest curvature."""
    power: Annotated[float, Field(ge=0, le=1)] = 0.5
    """0.5 makes the curvature of all directions one, 0 leaves it."""
    start: Literal["auto", "balanced", "loaded"] = "auto"
    """Where training starts: where the public texts prefer no answer on average (of an aligned
    subspace for a task with answers), or at the model as it was loaded. `auto` is `balanced` for
    two answers; of more, texts of one kind may well prefer one (docs/results/subspace.md)."""
    least_rank: Annotated[float, Field(ge=0, allow_inf_nan=False), Neutral(3.0)] = 3.0
    """Fewest directions of an aligned subspace that the clients' texts must make use of, as an
    effective rank over 64 of them; at most an eighth of `dimensions` is asked for. With fewer the
    public texts are too unlike them, and the run is made without a subspace (method.md section 9).
    A server that has no data cannot ask."""
    usual_spread: Annotated[float, Field(ge=0, allow_inf_nan=False), Neutral(1.75)] = 1.75
    """Spread of the answers' scores over the same texts, a standard deviation, for which a step
    along directions that change scores by one is of the right length. Rate and ε that are `auto`
    go with the spread. With `dimensions` up to 8 neither is asked; 0 asks nothing."""
    renew_every: Annotated[int, Field(ge=0), Neutral(0)] = 0
    """Rounds after which an aligned subspace is made again, at the weights of then; 0 is never."""
    seed: Seed = 0
    """Which texts, and what is drawn."""


class TaskSection(Section):
    name: str
    """A registered task, or `custom`."""
    source: str | None = None
    """Where the examples are, if not where the task says: a hub id, a folder, or one file."""
    source_config: str | None = None
    """Configuration of a hub data set, if not the task's."""
    train_split: str | None = None
    """Split to train on, if not the task's."""
    test_split: str | None = None
    """Split to evaluate on, if not the task's; without one, a part of the training split."""
    validation_split: Annotated[str | None, Neutral(None)] = None
    """Split that `evaluation.validation` examples come from; without one, from those that are held
    out and not tested on. What of it is in the test split is left out, and so is what of it is in
    the training split there."""
    format: Annotated[
        Literal["columns", "chat", "messages", "sharegpt", "alpaca"], Neutral("columns")
    ] = "columns"
    """What a row of a custom task is: `columns` for a prompt, or a conversation, whose loss is that
    of the assistant's tokens. `messages`: a list of `{role, content}`; `sharegpt`: a list
    `conversations` of `{from, value}`; `alpaca`: `instruction`, maybe `input`, `output`; `chat`:
    the one of them that the columns show."""
    chat_template: Annotated[str | None, Neutral(None)] = None
    """The Jinja template of a conversation, or a `.jinja` file that holds it, which is read with
    the recipe; by default that of the model's tokenizer."""
    prompt: str | None = None
    """Template with `{column}` fields, if not the task's."""
    image: Annotated[str | None, Neutral(None)] = None
    """Column of an image, if not the task's; there is no prompt then, and the verbalizers are
    classes of the network, by name or number (extra `vision`)."""
    image_size: Annotated[int | None, Field(ge=8, lt=2**12), Neutral(None)] = None
    """Pixels of a side that images are scaled to; what the network was made for by default."""
    label: str | None = None
    """Column of the label, if not the task's."""
    verbalizers: tuple[str, ...] | dict[str, str] | None = None
    """The answer for each label: in label order, or by label."""
    answer: str | None = None
    """Column of a free-text answer; the loss is then the mean token loss over it."""
    chosen: Annotated[str | None, Neutral(None)] = None
    """Column of the preferred answer of a pair; the loss is then - log σ of the difference of both
    answers' mean log-probabilities."""
    rejected: Annotated[str | None, Neutral(None)] = None
    """Column of the other answer of a pair."""
    holder: Annotated[str | None, Neutral(None)] = None
    """Column that says who holds a row, if not the task's; a natural partition needs it."""
    objective: Annotated[Choice, Neutral("loss")] = Choice(kind="loss")
    """What training makes small: `loss` (cross-entropy over the answers, or the mean token loss of
    free text), `accuracy` or `macro_f1`, which are smoothed by their `temperature`, of pairs
    `simpo` or `dpo`, or a function of your own, `module:function`; see `tasks.losses`. Evaluations
    report the usual loss."""
    cut: str | None = None
    """The field that is shortened when an example is longer than `max_length`."""
    max_length: Annotated[int, Field(ge=8, lt=2**20)] = 256
    """Longest example in tokens."""
    train_examples: Count | None = None
    """Use at most this many training examples."""
    seed: Seed = 0
    """Which examples are held out, and which are used where there are more than asked for."""


class Partition(Section):
    kind: Literal["iid", "dirichlet", "pathological", "single-label", "natural", "balanced"] = "iid"
    """How the examples are split over the clients. `balanced`: all clients hold equally many, the
    extreme ones included, the others as many of each label; what is left over reaches nobody."""
    column: Annotated[str | None, Neutral(None)] = None
    """`natural`: column that says who holds a row, if not `task.holder`. In a simulation the report
    names clients by it."""
    alpha: Positive = 0.5
    """Concentration of the Dirichlet distribution."""
    labels_per_client: Count = 1
    """Labels that a client holds in a pathological partition."""
    min_size: Count = 1
    """Fewest examples that a client may hold."""
    extreme: Annotated[int, Field(ge=0)] = 0
    """Clients, the last ones, that hold an equal share of a single label each, the labels in
    turn from the one that `seed` says; the other clients share the rest as `kind` says."""
    extreme_label: Annotated[int | None, Field(ge=0), Neutral(None)] = None
    """The one label of all extreme clients, by its number in the order of the verbalizers."""


class Federation(Section):
    clients: Annotated[int, Field(ge=1, lt=2**32 - 2)]
    """Clients K."""
    rounds: Count
    """Rounds R."""
    local_steps: Annotated[int, Field(ge=1, lt=2**16)] = 1
    """Local steps T in a round; 1 is high frequency."""
    clients_per_round: Count | None = None
    """Clients that are sampled for a round; all by default."""
    batch_size: Count = 16
    """Examples behind one local step; 4 in a subspace where neither this, `optimizer.estimator` nor
    `noise.perturbations` is set, since there more directions teach more than more examples."""
    weighting: Literal["uniform", "examples"] = "uniform"
    """Aggregation weights p_k: equal, or by the examples that a client holds."""
    aggregator: Annotated[Choice, Neutral("mean")] = Choice(kind="mean")
    """How the coefficients of a round's clients become one: see `federation.aggregators`."""
    clip_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """The server clips |g| at so many times what is usual: the median over a round's clients of
    their largest |g|, or the median of that over the last 20 rounds, whichever is more. 0 turns it
    off; with one or two clients in a round it is off."""
    weight_cap: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """With `weighting = "examples"`, a client's count counts up to so many times the median count;
    0 turns that off."""
    weights_over: Annotated[Literal["round", "step"], Neutral("round")] = "round"
    """Over whom the weights p_k of a step add up to one: the clients of the round (the paper), so
    that a step is the shorter the more of them are stopped before it, or those that took it."""
    transforms: Annotated[tuple[Choice, ...], Neutral([])] = ()
    """What happens to coefficients on the client before they are applied and reported, in this
    order: see `federation.transforms`."""
    partition: Partition = Partition()
    """How the examples are split."""


class Optimizer(Section):
    rule: Annotated[Choice, Neutral("sgd")] = Choice(kind="sgd")
    """The update rule: `sgd` (the method), `momentum`, `adam` or `hiso`; see `zo.update_rules`."""
    estimator: Annotated[Choice, Neutral("two-point")] = Choice(kind="two-point")
    """From losses to coefficients: `two-point` (the method), `one-sided` or `one-sided-mean`;
    without ε `forward-mode`, the exact slope along a direction, and in a subspace `backward`, its k
    numbers of exact gradient, for which activations are kept; see `zo.estimators`."""
    exact_clients: Annotated[
        Literal["able"] | tuple[Annotated[int, Field(ge=0)], ...], Neutral([])
    ] = ()
    """Clients that report the exact gradient in a subspace while the others follow `estimator`:
    their numbers, or `able` for all whose node says that it can (`--node-config gradients`)."""
    learning_rate: Literal["auto"] | Positive = "auto"
    """Learning rate η. `auto` is 1e-5, what learned best with a sensitivity mask where it was
    measured (docs/experiments.md; 1e-4 diverged there); in a subspace it follows from its
    dimensions and from the directions of a round (method.md section 9)."""
    schedule: Literal["auto", "constant", "linear", "cosine"] = "auto"
    """How η goes over the rounds; linear and cosine end at zero after the last. `auto` is linear in
    a subspace, constant elsewhere."""
    epsilon: Literal["auto"] | Positive = "auto"
    """Perturbation size ε; `auto` is 1e-3 in float32 and 3e-3 in bfloat16, and in a subspace 0.6 by
    the root of its dimensions."""


class Noise(Section):
    kind: Literal["auto", "gaussian", "tabulated", "rademacher", "orthogonal"] = "auto"
    """Distribution of z. `tabulated` is Gaussian from a table of 65,536 values up to 4.3, in a
    fifth of the time. `orthogonal` is for a subspace: directions that are orthogonal in blocks, so
    that each dimension is measured equally often. `auto` is that in a subspace, else `gaussian`."""
    directions: Literal["shared", "per-client"] = "shared"
    """One z for all clients of a step, or one for each client."""
    perturbations: Annotated[int, Field(ge=1, lt=2**8)] = 1
    """Directions that a step averages over; 7 in a subspace where `federation.batch_size` and
    `optimizer.estimator` are not set either: as many example passes as two for 16 examples."""
    keys: Annotated[Choice, Neutral("fresh")] = Choice(kind="fresh")
    """Where directions come from: `fresh` for each step, or a finite `pool` (FedKSeed)."""


class Evaluation(Section):
    metrics: Annotated[tuple[Choice, ...], Neutral([])] = ()
    """Metrics besides the loss, by name; empty means those of the kind of task. See
    `tasks.metrics`; `module:function` is one of your own."""
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**16), Neutral(64)] = 64
    """Longest answer in tokens that the model writes, where a metric compares written answers."""
    stop: Annotated[tuple[str, ...] | None, Neutral(None)] = None
    """Texts before which a written answer ends, besides the model's own end; a new line by default
    in a task with `answer`, which teaches no end, and none in a conversation."""
    examples: Count = 512
    """Held-out examples; fewer where the data set has fewer."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after every so many rounds, besides before and after; 0 is never."""
    validation: Annotated[int, Field(ge=0, lt=2**31), Neutral(0)] = 0
    """Held-out examples to choose a round by, none of which is among the `examples` that are tested
    on. Each evaluation measures both; 0 is none."""
    patience: Annotated[int, Field(ge=0, lt=2**31), Neutral(0)] = 0
    """The run ends after so many evaluations in a row whose validation score is not better than the
    best before; 0 is never. What is better: `runs.best_round`."""


class Selection(Section):
    kind: Literal["none", "gradip", "random", "list"] = "none"
    """Which clients are stopped early: nobody (Meerkat), those whose virtual paths are extreme
    (Meerkat-vp), `count` clients at random (the ablation), or `clients`."""
    calibration_steps: Annotated[int, Field(ge=2, lt=2**16)] = 100
    """T_cali, local steps from the initial θ that each client is judged by."""
    apply: bool = False
    """Keep the calibration's update: it is then round 0. Otherwise it is discarded, and the
    data pointer goes back to where it was."""
    signal: Literal["projected-gradient", "gradip"] = "projected-gradient"
    """What is judged: |g|, or |GradIP| (the paper), which is |g| times the factor
    |< p, z >| that all clients share; see docs/results/meerkat-vp.md for the choice."""
    first_window: Count = 20
    """T_init, steps of the first window; at most half of the path."""
    later_window: Count = 20
    """T_later, steps of the later window; at most half of the path."""
    rho_later: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    """A client is extreme if its signal's mean in the first window, by that in the later one, is
    above this, and"""
    rho_quiet: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """if its share of steps in the later window with a signal below `sigma` is above this."""
    sigma: Literal["auto"] | Positive = "auto"
    """σ, the signal below which a step is quiet."""
    action: Literal["stop", "taper"] = "stop"
    """What happens to extreme clients: one step a round (the paper), or the fewer steps the
    quieter they are."""
    every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Judge again after every so many rounds, from the paths of these; 0 is never. In the last
    `calibration_steps` steps before, all clients take all local steps, of which those beyond
    T_k are looked at but not aggregated."""
    count: Count | None = None
    """`random`: how many clients."""
    clients: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """`list`: which clients."""


class Runtime(Section):
    engine: Literal["local", "flower"] = "local"
    """Who runs the clients: this process, or Flower's simulation."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: CUDA where there is one."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the forward pass; 0 leaves it to torch."""
    compute: Literal["auto", "stored", "float32"] = "auto"
    """Type of the forward pass: that of the weights, or float32, which holds the same weights in
    twice the memory of bfloat16. `auto` is float32 on processors that have no use for bfloat16."""
    weights: Literal["stored", "int8", "int4"] = "stored"
    """Bits that the model's weights are kept in, all but the masked ones, once mask and subspace
    are found. Nobody else needs to know: mask, states and exports are those of the stored model."""
    theta: Literal["host", "device"] = "host"
    """Where a client keeps θ and draws z: in the CPU's memory, or in that of the model's device,
    where a step then copies neither. Both give the same bits. With a million masked values and
    more, set `noise.kind` to `tabulated` or `rademacher`: Gaussian values are drawn on the CPU."""
    compile: bool = False
    """Compile the forward pass; worth it from some hundred steps on."""
    prefix_cache: Annotated[int, Field(ge=0, lt=2**31)] = 256
    """MiB of memory for activations of the decoder blocks below the first that may move, by batch;
    0 computes them in each pass. Without `compile` no bit of a run depends on it."""
    prefix_disk: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """MiB on disk, in `cache_dir`, for those that memory has no room for."""
    tokens_per_pass: Count = 16384
    """Most tokens in one packed forward pass; a longer batch takes several."""
    tokens_together: Annotated[int, Field(ge=0, lt=2**31)] = 1024
    """Tokens up to which the passes of one step, at several places near θ, are made as one over so
    many copies of the batch; 0 makes them one by one. Losses differ by the rounding of sums."""
    recompute: bool = False
    """Keep no activations within decoder blocks for a backward pass, of mask, subspace and exact
    reports, and compute each block again: far less memory, and a forward pass more."""
    mask_passes: Literal[1, 2] = 1
    """1 keeps two float32 accumulators the size of the eligible tensors, 2 keeps one and reads
    the corpus twice."""
    cache_dir: str | None = None
    """Where converted models, masks and compiled code are kept; the user's cache by default."""


class Network(Section):
    transport: Literal["auto", "messages", "stream"] = "auto"
    """Flower messages, or a gRPC stream between server app and client app; `auto` is messages in
    simulation and stream in deployment."""
    listen: str = "0.0.0.0:0"
    """Where the server app listens for streams; port 0 takes a free one."""
    address: str | None = None
    """Where clients reach it, host:port; by default this machine's name and the port."""
    insecure: bool = False
    """Streams in plain text; for measurements on loopback, refused anywhere else."""
    quorum: Count | None = None
    """Fewest reports that close a round; by default more than half of the clients it samples."""
    deadline: Positive = 600.0
    """Seconds after which a round closes with the reports that are there, if they are enough."""
    rejoin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    """Seconds that a round waits for a client whose connection broke, if the others are enough."""
    patience: Positive = 3600.0
    """Seconds that the server waits for enough clients before it stops; it can be started again."""
    rebind: bool = False
    """May another node take over a client whose own node has left? Nodes with registered keys keep
    their identity; without keys a node that starts again is another one."""
    largest_scalar: Positive = 1e6
    """A report with a larger |g| is refused."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes of a simulation, each with a model; 0 is as many as there are cores."""


class Tracking(Section):
    """Who is told of a run's figures, by the machine of the run; no client gets this section."""

    to: tuple[str, ...] = ()
    """Trackers, by name: `tensorboard`, `wandb`, `mlflow`, `trackio`; each is an extra. Where they
    keep what they are told: docs/tracking.md."""
    project: Annotated[str, Field(min_length=1)] = "meerkat"
    """Project (MLflow: experiment) that the run is put into."""
    name: str | None = None
    """The run's name there; that of its directory by default."""
