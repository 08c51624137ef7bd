"""The tools of a small shop, in the form that Agent World Model scenarios have: one FastAPI app over SQLite.

The shopper is signed in; the cart and the orders are theirs. Nothing depends on the clock.
"""

import os
from typing import Literal

from fastapi import Body, FastAPI, HTTPException, Path, Query
from sqlalchemy import create_engine, text

engine = create_engine(os.getenv("DATABASE_PATH", "sqlite:///shop.db"), connect_args={"check_same_thread": False})
app = FastAPI(title="Shop", version="1.0.0")

CATEGORY = "A category, as list_categories gives it."
PRODUCT = "A product's id, as search_products gives it."
ORDER = "An order's id, as list_orders gives it."


def query(sql: str, **values) -> list[dict]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(sql), values).mappings()]


def change(*statements: tuple[str, dict]) -> None:
    """All of them, or none."""
    with engine.begin() as connection:
        for sql, values in statements:
            connection.execute(text(sql), values)


def refuse(status: int, reason: str) -> HTTPException:
    return HTTPException(status, reason)


def find_product(product_id: int) -> dict:
    found = query("SELECT * FROM products WHERE id = :id", id=product_id)
    if not found:
        raise refuse(404, f"there is no product {product_id}; search_products gives ids")
    return found[0]


def find_order(order_id: int) -> dict:
    found = query("SELECT * FROM orders WHERE id = :id", id=order_id)
    if not found:
        raise refuse(404, f"you have no order {order_id}; list_orders gives ids")
    return found[0]


def cart() -> dict:
    items = query(
        "SELECT product_id, name, quantity, price FROM cart_items JOIN products ON products.id = product_id "
        "ORDER BY product_id"
    )
    coupon = query("SELECT code, percent FROM coupons WHERE in_cart = 1")
    total = sum(item["quantity"] * item["price"] for item in items)
    if coupon:
        total = total * (100 - coupon[0]["percent"]) // 100
    return {"items": items, "coupon": coupon[0]["code"] if coupon else None, "total": total}


@app.get("/categories", operation_id="list_categories", summary="List the categories and how many products each has.")
async def list_categories():
    return query("SELECT category, COUNT(*) AS products FROM products GROUP BY category ORDER BY category")


@app.get("/products", operation_id="search_products", summary="Find products by words of the name or by category.")
async def search_products(
    name: str | None = Query(None, description="Part of the name."),
    category: str | None = Query(None, description=CATEGORY),
    max_price: int | None = Query(None, description="The highest price."),
    sort_by: Literal["id", "price", "rating"] = Query("id", description="Cheapest or best rated first."),
):
    if category and not query("SELECT 1 FROM products WHERE category = :category", category=category):
        raise refuse(404, f"there is no category {category!r}; list_categories gives them")
    order = {"id": "id", "price": "price, id", "rating": "rating DESC, id"}[sort_by]
    return query(
        "SELECT id AS product_id, name, price, rating, stock FROM products "
        "WHERE (:name IS NULL OR name LIKE '%' || :name || '%') AND (:category IS NULL OR category = :category) "
        "AND (:max_price IS NULL OR price <= :max_price) "
        f"ORDER BY {order} LIMIT 6",
        name=name,
        category=category,
        max_price=max_price,
    )


@app.get("/products/{product_id}", operation_id="get_product", summary="Everything about one product.")
async def get_product(product_id: int = Path(description=PRODUCT)):
    product = find_product(product_id)
    return {"product_id": product.pop("id")} | product


@app.get("/cart", operation_id="view_cart", summary="What is in the cart, and what it comes to.")
async def view_cart():
    return cart()


@app.post("/cart/items", operation_id="add_to_cart", summary="Put a product into the cart.")
async def add_to_cart(
    product_id: int = Body(description=PRODUCT), quantity: int = Body(1, description="How many.", ge=1)
):
    product = find_product(product_id)
    held = query("SELECT quantity FROM cart_items WHERE product_id = :id", id=product_id)
    wanted = quantity + (held[0]["quantity"] if held else 0)
    if wanted > product["stock"]:
        raise refuse(409, f"{product['name']} is out of stock: {product['stock']} left, {wanted} wanted")
    change(
        (
            "INSERT INTO cart_items (product_id, quantity) VALUES (:id, :quantity) "
            "ON CONFLICT (product_id) DO UPDATE SET quantity = quantity + :quantity",
            {"id": product_id, "quantity": quantity},
        )
    )
    return {"product_id": product_id, "quantity": wanted}


@app.delete("/cart/items/{product_id}", operation_id="remove_from_cart", summary="Take a product out of the cart.")
async def remove_from_cart(product_id: int = Path(description=PRODUCT)):
    if not query("SELECT 1 FROM cart_items WHERE product_id = :id", id=product_id):
        raise refuse(404, f"product {product_id} is not in the cart; view_cart shows what is")
    change(("DELETE FROM cart_items WHERE product_id = :id", {"id": product_id}))
    return {"removed": product_id}


@app.post("/cart/coupon", operation_id="apply_coupon", summary="Use a coupon for the cart.")
async def apply_coupon(code: str = Body(description="The coupon's code.", embed=True)):
    found = query("SELECT * FROM coupons WHERE code = :code", code=code)
    if not found:
        raise refuse(404, f"there is no coupon {code!r}")
    if not found[0]["active"]:
        raise refuse(409, f"coupon {code} has expired")
    change(("UPDATE coupons SET in_cart = (code = :code)", {"code": code}))
    return {"coupon": code, "total": cart()["total"]}


@app.post("/orders", operation_id="checkout", summary="Order what is in the cart.")
async def checkout():
    held = cart()
    if not held["items"]:
        raise refuse(409, "the cart is empty; add_to_cart fills it")
    order_id = query("SELECT MAX(id) + 1 AS id FROM orders")[0]["id"]
    added = {"id": order_id, "coupon": held["coupon"], "total": held["total"]}
    changes = [("INSERT INTO orders (id, status, coupon, total) VALUES (:id, 'open', :coupon, :total)", added)]
    for item in held["items"]:
        line = {"order_id": order_id} | item
        changes.append(("INSERT INTO order_items VALUES (:order_id, :product_id, :quantity, :price)", line))
        changes.append(("UPDATE products SET stock = stock - :quantity WHERE id = :product_id", line))
    change(*changes, ("DELETE FROM cart_items", {}), ("UPDATE coupons SET in_cart = 0", {}))
    return {"order_id": order_id, "total": held["total"]}


@app.get("/orders", operation_id="list_orders", summary="The orders, oldest first.")
async def list_orders(
    status: Literal["open", "shipped", "delivered", "cancelled"] | None = Query(None, description="Only these."),
):
    return query(
        "SELECT id AS order_id, status, total FROM orders WHERE (:status IS NULL OR status = :status) ORDER BY id",
        status=status,
    )


@app.get("/orders/{order_id}", operation_id="get_order", summary="One order and its items.")
async def get_order(order_id: int = Path(description=ORDER)):
    items = query(
        "SELECT product_id, name, quantity, order_items.price FROM order_items JOIN products ON id = product_id "
        "WHERE order_id = :id ORDER BY product_id",
        id=order_id,
    )
    order = find_order(order_id)
    return {"order_id": order.pop("id")} | order | {"items": items}


@app.post("/orders/{order_id}/cancel", operation_id="cancel_order", summary="Cancel an order that is still open.")
async def cancel_order(order_id: int = Path(description=ORDER)):
    order = find_order(order_id)
    if order["status"] != "open":
        raise refuse(409, f"order {order_id} is {order['status']}; only open orders can be cancelled")
    change(("UPDATE orders SET status = 'cancelled' WHERE id = :id", {"id": order_id}))
    return {"order_id": order_id, "status": "cancelled"}


@app.post("/orders/{order_id}/returns", operation_id="return_item", summary="Send back one item of a delivered order.")
async def return_item(
    order_id: int = Path(description=ORDER),
    product_id: int = Body(description="The item's product id, as get_order gives it."),
    reason: Literal["broken", "wrong", "late", "unwanted"] = Body(description="Why."),
):
    order = find_order(order_id)
    if order["status"] != "delivered":
        raise refuse(409, f"order {order_id} is {order['status']}; only delivered orders can be sent back")
    if not query("SELECT 1 FROM order_items WHERE order_id = :o AND product_id = :p", o=order_id, p=product_id):
        raise refuse(404, f"order {order_id} has no product {product_id}; get_order shows its items")
    if query("SELECT 1 FROM returns WHERE order_id = :o AND product_id = :p", o=order_id, p=product_id):
        raise refuse(409, f"product {product_id} of order {order_id} is on its way back already")
    line = {"order_id": order_id, "product_id": product_id, "reason": reason}
    change(("INSERT INTO returns VALUES (:order_id, :product_id, :reason)", line))
    return line


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=8000)
