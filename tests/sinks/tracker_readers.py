"""Print as JSON what trackers have of a run: read with the tracker's own reader, and Comet's archives as JSON.

The run's folder is the first argument. For each tracker: `ids` of its runs; `metrics`, name -> [[step, value], ...] in
the order of writing; `config`; `summary`; `heldout` and `samples`, each with columns and rows.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def metrics_of(rows: list[Json], step: str) -> Json:
    """Turn rows, each with its step, into name -> [[step, value], ...]."""
    found: Json = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float) and name != step:
                found.setdefault(name, []).append([row[step], value])
    return found


def read_wandb(run: Path) -> Json:
    """`wandb leet inspect --json`, of each part that `wandb sync` would append to one run."""
    read: Json = {"ids": set(), "config": {}, "summary": {}}
    history, files = [], {}
    for part in sorted((run / "sinks" / "wandb").glob("offline-run-*")):
        [file] = part.glob("*.wandb")
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for record in map(json.loads, lines):
            if record["type"] == "run":
                read["ids"].add(record["run"]["run_id"])
                read["config"] |= record["run"]["config"]["update"]
                read["name"], read["project"] = record["run"]["display_name"], record["run"]["project"]
                read["tags"] = record["run"].get("tags")
            if record["type"] == "history":
                history.append(record["history"]["item"])
            if record["type"] == "summary":
                read["summary"] |= record["summary"].get("update", {})
        for table in part.rglob("*.table.json"):
            values = json.loads(table.read_text())
            files[table.name.partition("_")[0]] = {"columns": values["columns"], "rows": values["data"]}
    rows = [{name: value for name, value in item.items() if name[0] != "_"} for item in history if "step" in item]
    return read | files | {"ids": sorted(read["ids"]), "metrics": metrics_of(rows, "step")}


def read_mlflow(run: Path) -> Json:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'sinks' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("qpref")
    [found] = client.search_runs([experiment.experiment_id])
    run_id = found.info.run_id
    histories = {name: client.get_metric_history(run_id, name) for name in found.data.metrics}
    tables = {}
    for name in ("heldout", "samples"):
        table = json.loads(Path(client.download_artifacts(run_id, f"{name}.json")).read_text())
        tables[name] = {"columns": table["columns"], "rows": table["data"]}
    return {
        "ids": [run_id],
        "name": found.info.run_name,
        "tags": sorted(tag for tag in found.data.tags if not tag.startswith("mlflow.")),
        "status": found.info.status,
        "note": found.data.tags.get("mlflow.note.content"),
        "metrics": {name: [[one.step, one.value] for one in history] for name, history in histories.items()},
        "config": found.data.params,
        "summary": json.loads(Path(client.download_artifacts(run_id, "summary.json")).read_text()),
        **tables,
    }


def read_trackio(run: Path) -> Json:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [found] = trackio.Api().runs("qpref")
    logs = SQLiteStorage.get_logs("qpref", found.name, run_id=found.id)
    summary: Json = {}
    tables = {}
    for row in logs:
        row.pop("timestamp", None)
        summary |= {name.removeprefix("summary/"): row.pop(name) for name in list(row) if name.startswith("summary/")}
        for name in ("heldout", "samples"):
            if isinstance(row.get(name), dict):
                rows = row[name]["_value"]
                tables[name] = {"columns": list(rows[0]), "rows": [list(one.values()) for one in rows]}
    return {
        "ids": [found.id],
        "name": found.name,
        "metrics": metrics_of(logs, "step"),
        "config": found.config,
        "summary": summary,
        **tables,
    }


def read_swanlab(run: Path) -> Json:
    """SwanLab's reader of offline runs, which `swanlab sync` uses."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    read: Json = {"ids": set(), "metrics": {}, "config": {}, "charts": []}
    for part in sorted((run / "sinks" / "swanlab").glob("run-*")):
        [file] = part.glob("*.swanlab")
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = Record.FromString(data)
            if record.HasField("start"):
                read["ids"].add(record.start.id)
                read |= {"name": record.start.name, "tags": list(record.start.tags)}
            if record.HasField("scalar"):
                scalar = record.scalar
                read["metrics"].setdefault(scalar.key, []).append([scalar.step, scalar.value.number])
            if record.HasField("media"):
                read["charts"].append(record.media.key)
        reader.close()
        for file in part.rglob("config.yaml"):
            import yaml

            read["config"] |= {name: entry["value"] for name, entry in yaml.safe_load(file.read_text()).items()}
    return read | {"ids": sorted(read["ids"])}


def read_comet(run: Path) -> Json:
    """Comet's archives, of which `comet upload` sends each message."""
    read: Json = {"ids": set(), "metrics": {}, "config": {}, "summary": {}}
    for path in sorted((run / "sinks" / "comet").glob("*.zip"), key=lambda one: one.stat().st_mtime):
        with zipfile.ZipFile(path) as archive:
            read["ids"].add(json.loads(archive.read("experiment.json"))["offline_id"])
            for line in archive.read("messages.json").decode().splitlines():
                message = json.loads(line)
                payload = message["payload"]
                if metric := payload.get("metric"):
                    read["metrics"].setdefault(metric["metricName"], []).append(
                        [metric["step"] if "step" in metric else payload["step"], metric["metricValue"]]
                    )
                if parameter := payload.get("param"):
                    read["config"][parameter["paramName"]] = parameter["paramValue"]
                if message["type"] == "log_other":
                    read["summary"][payload["key"]] = payload["value"]
                if message["type"] == "file_upload" and payload["additional_params"]["fileName"].endswith(".csv"):
                    rows = list(csv.reader(io.StringIO(archive.read(payload["file_path"]).decode())))
                    name = payload["additional_params"]["fileName"].removesuffix(".csv")
                    read[name] = {"columns": rows[0], "rows": rows[1:]}
    return read | {"ids": sorted(read["ids"])}


def read_tensorboard(run: Path) -> Json:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "sinks" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {tag: [[one.step, one.value] for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    return {
        "metrics": scalars,
        "config": _cells(texts["recipe/text_summary"]),
        "summary": _cells(texts["result/text_summary"]),
    }


def _cells(table: str) -> Json:
    pairs = [line.strip("| ").split(" | ", 1) for line in table.splitlines()[2:]]
    return {key: json.loads(value) for key, value in pairs}


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    print(json.dumps({name: globals()[f"read_{name}"](Path(folder)) for name in names}))
