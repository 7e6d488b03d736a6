"""Sends numbers to every node until enough have come back; writes down what came of each."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    jobs = int(context.run_config["jobs"])
    record = Path(os.environ["ALIGNFED_SERVER_DIRECTORY"]) / "echo.jsonl"
    done, sent = 0, {}
    while done < jobs:
        for node in set(grid.get_node_ids()) - set(sent.values()):
            content = RecordDict(
                {
                    "numbers": ArrayRecord({"numbers": Array(np.zeros(1000, np.uint8))}),
                    "config": ConfigRecord({"job": done}),
                }
            )
            message = Message(content, node, "train", ttl=600)
            for message_id in grid.push_messages([message]):
                if message_id is not None:
                    sent[message_id] = node
        for reply in grid.pull_messages(list(sent)):
            node = sent.pop(reply.metadata.reply_to_message_id)
            error = reply.error.reason if reply.has_error() else None
            done += error is None
            with record.open("a") as file:
                file.write(json.dumps({"node": node, "error": error, "run": context.run_id}) + "\n")
        time.sleep(0.2)
