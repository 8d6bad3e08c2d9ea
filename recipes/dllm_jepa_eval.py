"""Score a trained model on a task: items in, generations and scores out.

One process, or any number of them; every rank holds a whole model and takes its share of the batches:

    tune run dllm_jepa_eval --config eval_gsm8k checkpoint_dir=LLaDA-8B-Instruct output_dir=runs/eval num_shots=4
    tune run --nproc_per_node 8 dllm_jepa_eval --config eval_gsm8k checkpoint_dir=runs/gsm8k/hf output_dir=runs/eval_8

An evaluation that was interrupted goes on with resume=auto. Two of them are compared by `dllm-jepa compare A B`.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from tqdm import tqdm

from dllm_jepa import config, preflight, training
from dllm_jepa.errors import ConfigError
from dllm_jepa.evals import EvalTask, ItemResult, ResultsFolder, RunningScores, compare, remark_lines, summarize, table
from dllm_jepa.models import DTYPES, MaskedDiffusionLM
from dllm_jepa.trained_model import ModelSource, open_model


class Config(config.TrainedModel):
    """The keys of an evaluation; those of every recipe that uses a trained model stand in `config.TrainedModel`.

    What may change when an evaluation goes on is marked: model and task are compared by what is in them.
    """

    output_dir: Annotated[
        config.PathText,
        config.MayChange,
        Field(description="folder for results; refused if it holds another evaluation"),
    ]
    resume: Annotated[
        Literal["never", "auto"],
        config.MayChange,
        Field(description="auto goes on where an evaluation stopped: finished items are not done again"),
    ] = "never"
    base_dir: Annotated[
        config.PathText | None,
        config.MayChange,
        Field(description="a second model, evaluated on the same items for the paired difference; null = none"),
    ] = None
    task: Annotated[
        config.Component,
        config.Given(
            positional=("tokenizer",),
            keywords=("seed", "max_items", "progress"),
            offered=("decoding", "num_shots"),
        ),
        config.MayChange,
        Field(description="builder of the task: items, prompts, scores"),
    ]
    num_shots: Annotated[
        int | None,
        config.MayChange,
        Field(ge=0, description="solved examples in front of each question; null = the task has none"),
    ] = None
    max_items: Annotated[
        config.Count | None, config.MayChange, Field(description="evaluate only the first so many; null = all")
    ] = None
    decoding: Annotated[
        config.Component | None,
        config.MayChange,
        Field(description="how responses are generated; null for tasks that only measure likelihoods"),
    ] = None

    rules = (
        *config.TrainedModel.rules,
        config.rules.output_dir_can_be_written,
        config.rules.base_directory_exists,
        config.rules.decoding_builds,
        config.rules.task_gets_what_it_takes,
    )
    opens = (preflight.trained_model_opens, preflight.files_of_task_exist)


class DLLMJEPAEvalRecipe:
    """Evaluates a model, and a base to compare it with, on the items of one task.

    Args:
        cfg: checked config; docs/configs.md lists its keys.
        ranks: the processes.
    """

    def __init__(self, cfg: Config, ranks: training.Ranks) -> None:
        """Hold on to what the evaluation is made from; `setup` builds its parts."""
        self.cfg = cfg
        self.ranks = ranks
        self.folder = ResultsFolder(Path(cfg.output_dir))
        self.base_folder = ResultsFolder(Path(cfg.output_dir) / "base")

    def setup(self) -> None:
        """Build task and batches; all that the user may have got wrong comes before weights are loaded."""
        cfg = self.cfg
        self.source = open_model(cfg.checkpoint_dir, part=cfg.part, base=cfg.adapter_base, ranks=self.ranks)
        self.base = None if cfg.base_dir is None else open_model(cfg.base_dir, ranks=self.ranks)
        self.tokenizer = self.source.tokenizer(cfg.tokenizer)
        if self.base is not None:
            self.check_base(self.base)
        self.task = self.setup_task()
        for source in filter(None, (self.source, self.base)):
            self.task.check_context(source.model.sizes.max_seq_len)
        # Longest first: what does not fit into memory shows at once, and the ranks end together.
        lengths = self.task.lengths
        order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
        self.batches = [order[start : start + cfg.batch_size] for start in range(0, len(order), cfg.batch_size)]
        self.left = self.open_folder(self.source, self.folder, cfg.part)
        self.base_left = [] if self.base is None else self.open_folder(self.base, self.base_folder, "online")

    def check_base(self, base: ModelSource) -> None:
        """Refuse a base whose ids are other tokens: both models get the same ids.

        Raises:
            ConfigError: if they are.
        """
        base.check_ids(self.tokenizer)
        if not base.tokenizer(self.cfg.tokenizer).agrees_with(self.tokenizer):
            raise ConfigError(
                f"base_dir: {base.path} has another tokenizer than {self.source.path}, and both would get its ids: "
                "compare models of one vocabulary"
            )

    def setup_task(self) -> EvalTask:
        """The task, with the decoding and the number of shots if it has any."""
        cfg = self.cfg
        decoding = [] if cfg.decoding is None else [cfg.decoding.build()]
        shots = {} if cfg.num_shots is None else {"num_shots": cfg.num_shots}
        try:
            task: EvalTask = cfg.task.build(
                self.tokenizer,
                *decoding,
                **shots,
                seed=cfg.seed,
                max_items=cfg.max_items,
                progress=self.ranks.is_rank_zero,
            )
        except ValueError as error:  # a builder's word on its arguments
            raise ConfigError(f"task: {error}") from error
        return task

    def fingerprint(self, source: ModelSource, part: str) -> dict[str, Any]:
        """Model, task and settings: two evaluations with the same fingerprint have the same results."""
        cfg = self.cfg
        fixed = [n for n, field in type(cfg).model_fields.items() if not config.has_mark(field, config.MayChange)]
        settings = {name: value for name, value in cfg.model_dump(mode="json").items() if name in fixed}
        return settings | {"model": source.fingerprint, "part": part} | self.task.fingerprint()

    def open_folder(self, source: ModelSource, folder: ResultsFolder, part: str) -> list[int]:
        """Take a folder into use; returns the batches that this rank has to do."""
        fingerprint, resume = self.fingerprint(source, part), self.cfg.resume == "auto"
        done = self.ranks.on_rank_zero(lambda: folder.open(fingerprint, resume=resume))
        if self.ranks.on_rank_zero(lambda: folder.is_finished):
            return []
        left = [batch for batch in range(len(self.batches)) if batch not in done]
        return left[self.ranks.rank :: self.ranks.world_size]

    def run(self) -> None:
        """Evaluate the model, then the base; show what came out."""
        self.evaluate(self.source, self.folder, self.left)
        self.show(self.ranks.on_rank_zero(lambda: self.write_scores(self.source, self.folder, self.cfg.part)))
        if self.base is None:
            return
        base = self.base
        self.evaluate(base, self.base_folder, self.base_left)
        self.ranks.on_rank_zero(lambda: self.write_scores(base, self.base_folder, "online"))
        if self.ranks.is_rank_zero:
            print(f"\nA is the base.\n{compare(self.base_folder.path, self.folder.path)}")

    def show(self, scores: dict[str, Any]) -> None:
        """Print the table of the scores; on rank zero."""
        if not self.ranks.is_rank_zero:
            return
        print(f"\n{scores['checkpoint_dir']}\n\n{table(scores['scores'])}\n")
        print(f"{scores['seconds']:,.1f} s, {scores['tokens_per_second']:,.0f} tokens/s per process")
        print(*remark_lines(scores["remarks"]), sep="\n")
        print(f"written to {self.folder.path}")

    def evaluate(self, source: ModelSource, folder: ResultsFolder, batches: list[int]) -> None:
        """Evaluate this rank's batches, each of which is kept as soon as it is finished, and wait for the others."""
        if batches:
            model: MaskedDiffusionLM = source.load(DTYPES[self.cfg.dtype], self.ranks.device)
        num_items = sum(len(self.batches[batch]) for batch in batches)
        running = RunningScores()
        name = "items" if self.ranks.world_size == 1 else f"items of rank 0, one of {self.ranks.world_size}"
        with tqdm(total=num_items, desc=name, unit="item", disable=not self.ranks.is_rank_zero) as bar:
            for batch in batches:
                start = time.perf_counter()
                items = self.batches[batch]
                results: list[ItemResult] = self.task.evaluate(model, items, batch_size=self.cfg.batch_size)
                folder.append(self.ranks.rank, batch, results, time.perf_counter() - start)
                running.add(results)
                bar.set_postfix_str(str(running), refresh=False)
                bar.update(len(results))
        folder.wait(len(self.batches))

    def write_scores(self, source: ModelSource, folder: ResultsFolder, part: str) -> dict[str, Any]:
        """Merge the parts and write scores.json; on rank zero."""
        rows, seconds = folder.merge(len(self.task.lengths))
        num_tokens = sum(row["num_tokens"] for row in rows)
        scores = {
            "scores": summarize(rows),
            "num_items": len(rows),
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "checkpoint_dir": str(source.path),
            "facts": self.fingerprint(source, part),
            "remarks": self.task.remarks(),
            "config": self.cfg.model_dump(),
        }
        folder.finish(scores)
        return scores


@config.parse
def recipe_main(cfg: Config) -> None:
    """Join the other ranks, claim the output directory, evaluate."""
    with training.Ranks.join(cfg.device) as ranks, training.locked(Path(cfg.output_dir), ranks):
        recipe = DLLMJEPAEvalRecipe(cfg, ranks)
        try:
            recipe.setup()
            recipe.run()
        except KeyboardInterrupt:
            if ranks.is_rank_zero:
                print(f"interrupted: finished items are in {cfg.output_dir}; go on by resume=auto", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    recipe_main()
