"""The tools of a ticket desk, in the form that Agent World Model scenarios have: one FastAPI app over SQLite.

Nothing depends on the clock.
"""

import os
from typing import Annotated, Literal

from fastapi import Body, FastAPI, HTTPException, Path, Query
from sqlalchemy import create_engine, text

engine = create_engine(os.getenv("DATABASE_PATH", "sqlite:///tickets.db"), connect_args={"check_same_thread": False})
app = FastAPI(title="Ticket desk", version="1.0.0")

TICKET = "A ticket's id, as list_tickets gives it."
Status = Literal["open", "waiting", "closed"]
Priority = Literal["low", "normal", "high"]


def query(sql: str, **values) -> list[dict]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(sql), values).mappings()]


def change(*statements: tuple[str, dict]) -> None:
    """All of them, or none."""
    with engine.begin() as connection:
        for sql, values in statements:
            connection.execute(text(sql), values)


def find_ticket(ticket_id: int) -> dict:
    found = query("SELECT * FROM tickets WHERE id = :id", id=ticket_id)
    if not found:
        raise HTTPException(404, f"there is no ticket {ticket_id}; list_tickets gives ids")
    return found[0]


def find_unclosed(ticket_id: int) -> dict:
    ticket = find_ticket(ticket_id)
    if ticket["status"] == "closed":
        raise HTTPException(409, f"ticket {ticket_id} is closed; reopen_ticket opens it again")
    return ticket


@app.get("/tickets", operation_id="list_tickets", summary="List tickets, the oldest first.")
async def list_tickets(
    status: Annotated[Status | None, Query(description="Only these.")] = None,
    queue: str | None = Query(None, description="Only those of this queue, such as billing."),
    priority: Annotated[Priority | None, Query(description="Only these.")] = None,
    agent_id: int | None = Query(None, description="Only those of this agent; 0 for those of nobody."),
):
    return query(
        "SELECT id, title, customer, queue, priority, status, agent_id FROM tickets "
        "WHERE (:status IS NULL OR status = :status) AND (:queue IS NULL OR queue = :queue) "
        "AND (:priority IS NULL OR priority = :priority) "
        "AND (:agent_id IS NULL OR COALESCE(agent_id, 0) = :agent_id) ORDER BY id LIMIT 12",
        status=status,
        queue=queue,
        priority=priority,
        agent_id=agent_id,
    )


@app.get("/tickets/search", operation_id="search_tickets", summary="Find tickets by words of title, text or customer.")
async def search_tickets(words: str = Query(description="What to look for.")):
    return query(
        "SELECT id, title, customer, status FROM tickets "
        "WHERE title || ' ' || body || ' ' || customer LIKE '%' || :words || '%' ORDER BY id LIMIT 12",
        words=words,
    )


@app.get("/tickets/{ticket_id}", operation_id="get_ticket", summary="One ticket with its comments.")
async def get_ticket(ticket_id: int = Path(description=TICKET)):
    comments = query("SELECT author, body FROM comments WHERE ticket_id = :id ORDER BY rowid", id=ticket_id)
    return find_ticket(ticket_id) | {"comments": comments}


@app.get("/agents", operation_id="list_agents", summary="The agents, what they know, and how many tickets they have.")
async def list_agents():
    return query(
        "SELECT agents.id, name, skill, COUNT(tickets.id) AS tickets FROM agents "
        "LEFT JOIN tickets ON agent_id = agents.id AND status <> 'closed' GROUP BY agents.id ORDER BY agents.id"
    )


@app.post("/tickets/{ticket_id}/agent", operation_id="assign_ticket", summary="Give a ticket to an agent.")
async def assign_ticket(
    ticket_id: int = Path(description=TICKET),
    agent_id: int = Body(description="An agent's id, as list_agents gives it.", embed=True),
):
    find_unclosed(ticket_id)
    if not query("SELECT 1 FROM agents WHERE id = :id", id=agent_id):
        raise HTTPException(404, f"there is no agent {agent_id}; list_agents gives ids")
    change(("UPDATE tickets SET agent_id = :agent WHERE id = :id", {"agent": agent_id, "id": ticket_id}))
    return {"ticket_id": ticket_id, "agent_id": agent_id}


@app.post("/tickets/{ticket_id}/priority", operation_id="set_priority", summary="Change a ticket's priority.")
async def set_priority(
    ticket_id: Annotated[int, Path(description=TICKET)],
    priority: Annotated[Priority, Body(description="The new one.", embed=True)],
):
    find_unclosed(ticket_id)
    change(("UPDATE tickets SET priority = :priority WHERE id = :id", {"priority": priority, "id": ticket_id}))
    return {"ticket_id": ticket_id, "priority": priority}


@app.post("/tickets/{ticket_id}/comments", operation_id="add_comment", summary="Write a comment under a ticket.")
async def add_comment(
    ticket_id: int = Path(description=TICKET), body: str = Body(description="The text.", embed=True, min_length=1)
):
    find_unclosed(ticket_id)
    change(("INSERT INTO comments VALUES (:id, 'desk', :body)", {"id": ticket_id, "body": body}))
    return {"ticket_id": ticket_id, "author": "desk", "body": body}


@app.post("/tickets/{ticket_id}/queue", operation_id="move_ticket", summary="Move a ticket to another queue.")
async def move_ticket(
    ticket_id: int = Path(description=TICKET),
    queue: str = Body(description="The other queue, such as billing.", embed=True),
):
    find_unclosed(ticket_id)
    known = [row["queue"] for row in query("SELECT DISTINCT skill AS queue FROM agents ORDER BY skill")]
    if queue not in known:
        raise HTTPException(404, f"there is no queue {queue!r}; the queues are {', '.join(known)}")
    moved = {"queue": queue, "id": ticket_id}
    change(("UPDATE tickets SET queue = :queue, agent_id = NULL WHERE id = :id", moved))
    return {"ticket_id": ticket_id, "queue": queue, "agent_id": None}


@app.post("/tickets/{ticket_id}/close", operation_id="close_ticket", summary="Close a ticket that somebody works on.")
async def close_ticket(
    ticket_id: int = Path(description=TICKET),
    resolution: Literal["solved", "duplicate", "refused"] = Body(description="How it ended.", embed=True),
):
    if find_unclosed(ticket_id)["agent_id"] is None:
        raise HTTPException(409, f"nobody works on ticket {ticket_id}; assign_ticket before you close it")
    closed = {"resolution": resolution, "id": ticket_id}
    change(("UPDATE tickets SET status = 'closed', resolution = :resolution WHERE id = :id", closed))
    return {"ticket_id": ticket_id, "status": "closed", "resolution": resolution}


@app.post("/tickets/{ticket_id}/reopen", operation_id="reopen_ticket", summary="Open a closed ticket again.")
async def reopen_ticket(ticket_id: int = Path(description=TICKET)):
    ticket = find_ticket(ticket_id)
    if ticket["status"] != "closed":
        raise HTTPException(409, f"ticket {ticket_id} is {ticket['status']}; only closed tickets can be reopened")
    change(("UPDATE tickets SET status = 'open', resolution = NULL WHERE id = :id", {"id": ticket_id}))
    return {"ticket_id": ticket_id, "status": "open"}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=8000)
