"""The whole page: headline, sections, style and script in one document that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from importlib.resources import files

from raychain.core.wording import clock, macs, percent, uncounted
from raychain.core.wording import number as digits
from raychain.pages import rungs, search_json, searched, tables
from raychain.pages.chain_drawing import baseline, chain, cost_bars
from raychain.pages.curves import arrows, learning
from raychain.pages.loading import PRINCIPAL, Run, amount, mapping, number
from raychain.pages.markup import Markup, join, tag
from raychain.pages.scales import span
from raychain.pages.searched import Search
from raychain.pages.terms import explained, glossary
from raychain.pages.timeline import Story, story, timeline
from raychain.pages.worth import Alone, worth, worth_of_search
from raychain.records import SearchRecord, TotalsRecord

NBSP = "\u00a0"
STATES = {"succeeded": "✓", "failed": "✕", "interrupted": "❚❚", "running": "▶"}
ENDED = ("The run has ended.", "The search has ended.")
"""What the live view says last."""
OTHERS = 4
"""Metrics beside the score in the headline."""


def page(run: Run | None, found: SearchRecord | None, alone: Alone | None = None, live: str | None = None) -> str:
    """The document for a run, a search, or both; `alone` is what the run's last model reached without a chain.

    With `live` it follows what it shows, and `live` says how things stand.
    """
    search = search_json.parse(found) if found is not None else None
    content: list[Markup | None] = []
    record = run.record if run else found
    name = ((record.name if record else None) or "run") + ("" if run else " (search)")
    if run:
        content += _run(run, alone)
    if search:
        content += _search(search, None if run or found is None else _title(name, found.status))
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    content.append(glossary(join(content)))
    foot = tag("footer", f"Made by raychain report, {made}.")
    return _document(f"{name} · raychain", join([*content, foot]), live)


def _document(title: str, content: Markup, live: str | None) -> str:
    style, script = ((files(__package__) / name).read_text("utf-8") for name in ("page.css", "page.js"))
    connect = ""
    if live is not None:
        script += (files(__package__) / "live.js").read_text("utf-8")
        connect = "; connect-src 'self'"
        content = join([tag("p", live, id="live", role="status", data_ended="" if live in ENDED else None), content])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:{connect}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    told = tag("div", "", id="tip", role="tooltip", hidden="")
    toggle = tag("button", "◐", type="button", id="theme", hidden="", title="Light or dark", aria_label="Light or dark")
    body = tag("body", toggle, tag("main", content), told, tag("script", Markup(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _section(title: str, *content: Markup | None, note: str = "") -> Markup | None:
    """A section with its heading; None without content."""
    if not any(content):
        return None
    return tag("section", tag("h2", title), tag("p", note, class_="lead") if note else None, *content)


def _run(run: Run, alone: Alone | None) -> list[Markup | None]:
    tale = story(run)
    return [
        _headline(run, tale, alone),
        _section("The chain", chain(run), tables.stages(run), note=_chain_note(run)),
        _section("Measured", tables.measured(run)),
        _section("Learning", learning(run) or _absent("Nothing was logged yet."), note=_learning_note(run)),
        _time(run, tale),
        _section("Restarts", tables.restarts(run, tale),
                 note="Worker groups that ended early; the next one went on from the last checkpoint."),
        _section("Data", tables.data_health(run)),
        _section("Environment", tables.environment(run)),
        _section("Configuration", tables.configuration(run)),
    ]  # fmt: skip


def _absent(text: str) -> Markup:
    return tag("p", text, class_="muted")


def _headline(run: Run, tale: Story | None, alone: Alone | None) -> Markup:
    return tag(
        "header",
        _title(run.record.name or "run", run.record.status),
        worth(run, alone),
        tag("p", _summary(run, run.record.status or "unknown"), class_="summary"),
        _figures(_run_figures(run, tale, alone)),
        *(tag("p", line, class_="muted") for line in uncounted([stage.record.content() for stage in run.stages])),
        cost_bars(run),
    )


def _title(name: str, status: str | None) -> Markup:
    """The name, and how the run or the search ended."""
    chip = None
    if status:
        chip = tag("span", tag("i", STATES.get(status, "?"), aria_hidden="true"), f" {status}",
                   class_=f"status {status}" if status in STATES else "status")  # fmt: skip
    return tag("div", tag("h1", name), chip, class_="title")


def _summary(run: Run, status: str) -> str:
    """The run in a sentence or two."""
    if not run.stages:
        return "No stage is known yet."
    models = [stage.model for stage in run.stages]
    kind = "One model" if len(models) == 1 else f"A chain of {len(models)} models up to {models[-1]}"
    done = sum(stage.done for stage in run.stages)
    if done == len(models):
        given = any(stage.status == "given" for stage in run.stages)
        return f"{kind}, the first one given, all others trained." if given else f"{kind}, all trained."
    at = next(stage for stage in run.stages if not stage.done)
    told = f"{kind}. Stage {at.index + 1} of {len(models)}, {at.model}, "
    last = at.lines[-1] if at.lines else {}
    step, epoch = number(last.get("step")), number(last.get("epoch"))
    where = f"step {step:,.0f}" if step is not None else "its start"
    where += f" (epoch {epoch:.2f})" if epoch is not None else ""
    of = f" of {at.length}" if at.length else ""
    if status == "running":
        return f"{told}is at {where}{of}."
    verb = "failed" if status == "failed" or at.status == "failed" else "stopped"
    return f"{told}{verb} at {where}{of}. The same command continues it."


def _figures(figures: list[tuple[str, str, str]]) -> Markup | None:
    """Large numbers: what, value, and a remark."""
    if not figures:
        return None
    return tag("div", *(
        tag("div", tag("div", value, class_="value"), tag("div", _word(what), class_="what"),
            tag("div", remark, class_="remark") if remark else None)
        for what, value, remark in figures
    ), class_="figures")  # fmt: skip


def _word(what: str) -> Markup:
    """What a figure is, with its meaning where that is known."""
    found = explained(what)
    return found if isinstance(found, Markup) else join(_unbroken(what))


def _unbroken(text: str) -> list[object]:
    """The text with words of moderate length, such as model names, kept on one line."""
    words = text.split(" ")
    return [part for word in words for part in (tag("span", word, class_="word") if len(word) < 18 else word, " ")]


def _run_figures(run: Run, tale: Story | None, alone: Alone | None) -> list[tuple[str, str, str]]:
    totals = run.record.totals or TotalsRecord()
    measured = [stage for stage in run.stages if stage.metrics]
    found = []
    if measured:
        last = measured[-1]
        shown = [(d, value) for d in run.measures if (value := d.value(last.metrics)) is not None]
        if shown:
            (score, value), *others = shown[: 1 + OTHERS]
            more = [f"and {len(shown) - 1 - OTHERS} more"] if len(shown) > 1 + OTHERS else []
            words = [f"{arrows(d.label, '→')} {d.written(own)}".replace(" ", NBSP) for d, own in others]
            found.append((f"{arrows(score.label)} of {last.model}", score.written(value), ", ".join([*words, *more])))
    planned = "" if run.stages and all(stage.done for stage in run.stages) else "planned: "
    name, length = baseline(run) if run.stages else ("the last model", "")
    speedup, share, cost = map(amount, (totals.speedup, totals.percent_of_baseline, totals.macs))
    if speedup is not None and (alone or len(run.stages) == 1):  # of what nobody measured it would say too much
        what = "of its own baseline" if len(run.stages) == 1 else f"against {name} alone"
        found.append(
            (f"{planned}speed-up {what}", f"{digits(speedup)}×", f"in MACs, alone for {length}" if length else "")
        )
    if cost:
        remark = f"{percent(share)} % of the {macs(totals.baseline_macs)} alone" if share is not None else ""
        found.append((f"{planned}training MACs", macs(cost), remark))
    wall = [w for stage in run.stages if (w := amount(stage.record.wall_s)) is not None]
    if tale and not planned:
        found.append(("training time", clock(sum(wall) or tale.trained), f"of {clock(tale.at_work)} at work"))
    elif tale:
        found.append(("training time so far", clock(tale.trained), f"of {clock(tale.at_work)} at work"))
    elif wall:
        found.append(("training time", clock(sum(wall)), ""))
    return found


def _chain_note(run: Run) -> str:
    if len(run.stages) < 2:
        return ""
    transfer = mapping(run.config.get("transfer"))
    grown = " and ".join(f"{transfer[key]} ({key})" for key in ("width", "depth") if transfer.get(key))
    alpha = number(mapping(transfer.get("distill")).get("alpha"))
    follows = f" and follows its features (distillation weight {alpha:g})" if alpha else ""
    image = all(stage.image_params for stage in run.stages)
    what = f"{PRINCIPAL[run.stages[-1].principal]}, as are the ratios" if image else "numbers of parameters"
    grown = f", grown by the operators {grown}," if grown else ""
    share = number(transfer.get("shrink"))
    if share is not None and share < 1:
        grown += f" shrunk to {100 * share:g} % with a random start as the rest,"
    before = "the one before it"
    if any(stage.record.origin and stage.status != "given" for stage in run.stages):
        before += ", or from the checkpoint in its place,"
    return f"Each model starts from {before}{grown}{follows}. Areas are {what}."


def _learning_note(run: Run) -> str:
    distilled = any(number(line.get("distill_loss")) for line in run.lines[-3:])
    return (
        "Solid: the loss of the task, which is comparable between stages. Dashed: the distillation term."
        if distilled
        else ""
    )


def _time(run: Run, tale: Story | None) -> Markup | None:
    if tale is None:
        return _section("Time", _absent("There is no trace of this run yet (trace.json)."))
    share = 100 * tale.trained / tale.at_work if tale.at_work else 0.0
    note = f"Training filled {share:.1f} % of {clock(tale.at_work)}."
    here = [gap for gap in tale.gaps if not gap.away]
    if here:
        longest = max(here, key=lambda gap: gap.length)
        note += f" It stood still {len(here)} time{'s' if len(here) > 1 else ''}, at most for {span(longest.length)}."
    if tale.away:
        many = len(tale.away)
        note += (
            f" The run was not at work {'once' if many == 1 else f'{many} times'} in between; the axis is cut there."
        )
    found = tables.gaps(tale)
    return _section(
        "Time", timeline(run, tale), tag("h3", "When training stood still") if found else None, found, note=note
    )


RUNGS = "Chains are compared at equal training MACs; one that is not among the best of those before it is stopped."


def _search(search: Search, heading: Markup | None) -> list[Markup | None]:
    measured = sum(search.value(trial) is not None for trial in search.trials)
    better = "" if search.metric.best == "high" else ", of which less is better"
    head = None
    if heading:
        summary = (
            f"{len(search.trials)} trials, {measured} of them measured. Accuracy is {search.metric.label}{better}."
        )
        head = tag("header", heading, worth_of_search(search), tag("p", summary, class_="summary"),
                   rungs.parts(search), _figures(_search_figures(search)))  # fmt: skip
    tree_note = "Chains that begin alike share those stages. ×n: in n trials; the heavier outline leads to the best."
    return [
        head,
        _section("Accuracy and cost", searched.pareto(search) or _absent("No trial was measured yet."),
                 note="Each dot a trial; on the line, those that no cheaper trial beats."),
        _section("Against each model alone", searched.against(search)),
        _section("Shared stages", searched.tree(search), note=tree_note),
        _section("Rungs and verdicts", rungs.rungs(search), note=RUNGS),
        _section("Trials", searched.trials(search)),
    ]  # fmt: skip


def _search_figures(search: Search) -> list[tuple[str, str, str]]:
    found, best = [], search.best
    value = search.value(best) if best else None
    if best and value is not None:
        found.append((f"best {search.metric.label}", search.metric.written(value), searched.named(search, best)))
    if best and best.macs:
        alone = amount(search.baseline.macs)
        remark = f"{100 * best.macs / alone:.1f} % of {search.baseline.model or 'the baseline'} alone" if alone else ""
        found.append(("its training MACs", macs(best.macs), remark))
        if alone:
            large = (search.value(t) for t in search.trials if len(t.chain) == 1 and t.macs == alone)
            reached = next((f": {search.metric.written(v)}" for v in large if v is not None), "")
            if reached:  # of what nobody measured it would say too much
                remark = f"in MACs, against the last model alone{reached}"
                found.append(("its speed-up", f"{digits(alone / best.macs)}×", remark))
    if search.requested and search.trained is not None:
        saved = 100 * (1 - search.trained / search.requested)
        remark = f"{digits(search.trained)} of {digits(search.requested)} stage epochs trained"
        found.append(("saved by sharing stages", f"{saved:.0f} %", remark))
    return found
