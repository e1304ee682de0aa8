"""
The 22 PDS-H queries as Polars expressions, with the specification's validation parameters.

They are derived from TPC-H and not comparable to published TPC-H results. Each is a pure function
of the tables and collects nothing. Amounts are floats (see ``data.tables``), and joins stand in
the order that keeps them small, since Polars joins in the order written.
"""

from collections.abc import Callable, Mapping
from datetime import date
from typing import Final

import polars as pl
from polars import col

from benchmarks.pdsh.tables import Tables

_REVENUE: Final = col.l_extendedprice * (1 - col.l_discount)


def _total(amount: pl.Expr) -> pl.Expr:
    """Add up a whole column as SQL does: null, not zero, where there is nothing to add."""
    return pl.when(amount.count() > 0).then(amount.sum())


def q1(t: Tables) -> pl.LazyFrame:
    """Q1, pricing summary report: amounts by return flag and line status."""
    return (
        t.lineitem.filter(col.l_shipdate <= date(1998, 9, 2))
        .group_by("l_returnflag", "l_linestatus")
        .agg(
            sum_qty=col.l_quantity.sum(),
            sum_base_price=col.l_extendedprice.sum(),
            sum_disc_price=_REVENUE.sum(),
            sum_charge=(_REVENUE * (1 + col.l_tax)).sum(),
            avg_qty=col.l_quantity.mean(),
            avg_price=col.l_extendedprice.mean(),
            avg_disc=col.l_discount.mean(),
            count_order=pl.len(),
        )
        .sort("l_returnflag", "l_linestatus")
    )


def q2(t: Tables) -> pl.LazyFrame:
    """Q2, minimum cost supplier: who in Europe sells a part at the lowest cost."""
    offers = (
        t.part.filter(col.p_size == 15, col.p_type.str.ends_with("BRASS"))
        .join(t.partsupp, left_on="p_partkey", right_on="ps_partkey")
        .join(t.supplier, left_on="ps_suppkey", right_on="s_suppkey")
        .join(t.nation, left_on="s_nationkey", right_on="n_nationkey")
        .join(t.region, left_on="n_regionkey", right_on="r_regionkey")
        .filter(col.r_name == "EUROPE")
    )
    cheapest = offers.group_by("p_partkey").agg(ps_supplycost=col.ps_supplycost.min())
    return (
        offers.join(cheapest, on=["p_partkey", "ps_supplycost"])
        .select(
            "s_acctbal",
            "s_name",
            "n_name",
            "p_partkey",
            "p_mfgr",
            "s_address",
            "s_phone",
            "s_comment",
        )
        .sort(
            "s_acctbal",
            "n_name",
            "s_name",
            "p_partkey",
            descending=[True, False, False, False],
        )
        .head(100)
    )


def q3(t: Tables) -> pl.LazyFrame:
    """Q3, shipping priority: the unshipped orders of the highest value."""
    return (
        t.customer.filter(col.c_mktsegment == "BUILDING")
        .join(t.orders, left_on="c_custkey", right_on="o_custkey")
        .filter(col.o_orderdate < date(1995, 3, 15))
        .join(t.lineitem, left_on="o_orderkey", right_on="l_orderkey")
        .filter(col.l_shipdate > date(1995, 3, 15))
        .group_by("o_orderkey", "o_orderdate", "o_shippriority")
        .agg(revenue=_REVENUE.sum())
        .select(col.o_orderkey.alias("l_orderkey"), "revenue", "o_orderdate", "o_shippriority")
        .sort("revenue", "o_orderdate", descending=[True, False])
        .head(10)
    )


def q4(t: Tables) -> pl.LazyFrame:
    """Q4, order priority checking: orders of a quarter with a line received late."""
    late = t.lineitem.filter(col.l_commitdate < col.l_receiptdate)
    return (
        t.orders.filter(
            col.o_orderdate.is_between(date(1993, 7, 1), date(1993, 10, 1), closed="left")
        )
        .join(late, left_on="o_orderkey", right_on="l_orderkey", how="semi")
        .group_by("o_orderpriority")
        .agg(order_count=pl.len())
        .sort("o_orderpriority")
    )


def q5(t: Tables) -> pl.LazyFrame:
    """Q5, local supplier volume: revenue in Asia where customer and supplier share a nation."""
    return (
        t.region.filter(col.r_name == "ASIA")
        .join(t.nation, left_on="r_regionkey", right_on="n_regionkey")
        .join(t.customer, left_on="n_nationkey", right_on="c_nationkey")
        .join(t.orders, left_on="c_custkey", right_on="o_custkey")
        .filter(col.o_orderdate.is_between(date(1994, 1, 1), date(1995, 1, 1), closed="left"))
        .join(t.lineitem, left_on="o_orderkey", right_on="l_orderkey")
        .join(
            t.supplier,
            left_on=["l_suppkey", "n_nationkey"],
            right_on=["s_suppkey", "s_nationkey"],
        )
        .group_by("n_name")
        .agg(revenue=_REVENUE.sum())
        .sort("revenue", descending=True)
    )


def q6(t: Tables) -> pl.LazyFrame:
    """Q6, forecasting revenue change: what discounts of 5 to 7 percent cost in a year."""
    return t.lineitem.filter(
        col.l_shipdate.is_between(date(1994, 1, 1), date(1995, 1, 1), closed="left"),
        col.l_discount.is_between(0.05, 0.07),
        col.l_quantity < 24,
    ).select(revenue=_total(col.l_extendedprice * col.l_discount))


def q7(t: Tables) -> pl.LazyFrame:
    """Q7, volume shipping: trade between France and Germany, by year."""
    nations = t.nation.filter(col.n_name.is_in(["FRANCE", "GERMANY"]))
    buyers = t.customer.join(nations, left_on="c_nationkey", right_on="n_nationkey").select(
        "c_custkey", cust_nation=col.n_name
    )
    sellers = t.supplier.join(nations, left_on="s_nationkey", right_on="n_nationkey").select(
        "s_suppkey", supp_nation=col.n_name
    )
    return (
        t.lineitem.filter(col.l_shipdate.is_between(date(1995, 1, 1), date(1996, 12, 31)))
        .join(sellers, left_on="l_suppkey", right_on="s_suppkey")
        .join(t.orders, left_on="l_orderkey", right_on="o_orderkey")
        .join(buyers, left_on="o_custkey", right_on="c_custkey")
        .filter(col.supp_nation != col.cust_nation)
        .group_by("supp_nation", "cust_nation", l_year=col.l_shipdate.dt.year())
        .agg(revenue=_REVENUE.sum())
        .sort("supp_nation", "cust_nation", "l_year")
    )


def q8(t: Tables) -> pl.LazyFrame:
    """Q8, national market share: Brazil's part of a kind of steel sold in America, by year."""
    buyers = (
        t.region.filter(col.r_name == "AMERICA")
        .join(t.nation, left_on="r_regionkey", right_on="n_regionkey")
        .join(t.customer, left_on="n_nationkey", right_on="c_nationkey")
    )
    sellers = t.supplier.join(t.nation, left_on="s_nationkey", right_on="n_nationkey").select(
        "s_suppkey", nation=col.n_name
    )
    volume_of_brazil = pl.when(col.nation == "BRAZIL").then(_REVENUE).otherwise(0.0)
    return (
        t.part.filter(col.p_type == "ECONOMY ANODIZED STEEL")
        .join(t.lineitem, left_on="p_partkey", right_on="l_partkey")
        .join(t.orders, left_on="l_orderkey", right_on="o_orderkey")
        .filter(col.o_orderdate.is_between(date(1995, 1, 1), date(1996, 12, 31)))
        .join(buyers, left_on="o_custkey", right_on="c_custkey", how="semi")
        .join(sellers, left_on="l_suppkey", right_on="s_suppkey")
        .group_by(o_year=col.o_orderdate.dt.year())
        .agg(mkt_share=volume_of_brazil.sum() / _REVENUE.sum())
        .sort("o_year")
    )


def q9(t: Tables) -> pl.LazyFrame:
    """Q9, product type profit measure: profit on green parts, by nation and year."""
    profit = _REVENUE - col.ps_supplycost * col.l_quantity
    return (
        t.part.filter(col.p_name.str.contains("green", literal=True))
        .join(t.lineitem, left_on="p_partkey", right_on="l_partkey")
        .join(
            t.partsupp,
            left_on=["p_partkey", "l_suppkey"],
            right_on=["ps_partkey", "ps_suppkey"],
        )
        .join(t.supplier, left_on="l_suppkey", right_on="s_suppkey")
        .join(t.nation, left_on="s_nationkey", right_on="n_nationkey")
        .join(t.orders, left_on="l_orderkey", right_on="o_orderkey")
        .group_by(nation=col.n_name, o_year=col.o_orderdate.dt.year())
        .agg(sum_profit=profit.sum())
        .sort("nation", "o_year", descending=[False, True])
    )


def q10(t: Tables) -> pl.LazyFrame:
    """Q10, returned item reporting: the customers who returned most in a quarter."""
    return (
        t.orders.filter(
            col.o_orderdate.is_between(date(1993, 10, 1), date(1994, 1, 1), closed="left")
        )
        .join(t.lineitem, left_on="o_orderkey", right_on="l_orderkey")
        .filter(col.l_returnflag == "R")
        .group_by("o_custkey")
        .agg(revenue=_REVENUE.sum())
        .join(t.customer, left_on="o_custkey", right_on="c_custkey")
        .join(t.nation, left_on="c_nationkey", right_on="n_nationkey")
        .select(
            col.o_custkey.alias("c_custkey"),
            "c_name",
            "revenue",
            "c_acctbal",
            "n_name",
            "c_address",
            "c_phone",
            "c_comment",
        )
        .sort("revenue", descending=True)
        .head(20)
    )


def q11(t: Tables) -> pl.LazyFrame:
    """Q11, important stock identification: the parts that make up most of Germany's stock value."""
    return (
        t.nation.filter(col.n_name == "GERMANY")
        .join(t.supplier, left_on="n_nationkey", right_on="s_nationkey")
        .join(t.partsupp, left_on="s_suppkey", right_on="ps_suppkey")
        .group_by("ps_partkey")
        .agg(value=(col.ps_supplycost * col.ps_availqty).sum())
        .filter(col.value > 0.0001 * col.value.sum())
        .sort("value", descending=True)
    )


def q12(t: Tables) -> pl.LazyFrame:
    """Q12, shipping modes and order priority: do cheap modes delay urgent orders."""
    high = col.o_orderpriority.is_in(["1-URGENT", "2-HIGH"])
    return (
        t.lineitem.filter(
            col.l_shipmode.is_in(["MAIL", "SHIP"]),
            col.l_commitdate < col.l_receiptdate,
            col.l_shipdate < col.l_commitdate,
            col.l_receiptdate.is_between(date(1994, 1, 1), date(1995, 1, 1), closed="left"),
        )
        .join(t.orders, left_on="l_orderkey", right_on="o_orderkey")
        .group_by("l_shipmode")
        .agg(high_line_count=high.sum(), low_line_count=high.not_().sum())
        .sort("l_shipmode")
    )


def q13(t: Tables) -> pl.LazyFrame:
    """Q13, customer distribution: how many customers have placed how many orders."""
    orders = t.orders.filter(~col.o_comment.str.contains("special.*requests"))
    return (
        t.customer.join(orders, left_on="c_custkey", right_on="o_custkey", how="left")
        .group_by("c_custkey")
        .agg(c_count=col.o_orderkey.count())
        .group_by("c_count")
        .agg(custdist=pl.len())
        .sort("custdist", "c_count", descending=True)
    )


def q14(t: Tables) -> pl.LazyFrame:
    """Q14, promotion effect: the share of a month's revenue that came from promoted parts."""
    promoted = pl.when(col.p_type.str.starts_with("PROMO")).then(_REVENUE).otherwise(0.0)
    return (
        t.lineitem.filter(
            col.l_shipdate.is_between(date(1995, 9, 1), date(1995, 10, 1), closed="left")
        )
        .join(t.part, left_on="l_partkey", right_on="p_partkey")
        .select(promo_revenue=100 * promoted.sum() / _total(_REVENUE))
    )


def q15(t: Tables) -> pl.LazyFrame:
    """Q15, top supplier: whoever shipped the most in a quarter."""
    return (
        t.lineitem.filter(
            col.l_shipdate.is_between(date(1996, 1, 1), date(1996, 4, 1), closed="left")
        )
        .group_by("l_suppkey")
        .agg(total_revenue=_REVENUE.sum())
        # One pass: summed a second time for the maximum, floats might not come out equal.
        .filter(col.total_revenue == col.total_revenue.max())
        .join(t.supplier, left_on="l_suppkey", right_on="s_suppkey")
        .select(col.l_suppkey.alias("s_suppkey"), "s_name", "s_address", "s_phone", "total_revenue")
        .sort("s_suppkey")
    )


def q16(t: Tables) -> pl.LazyFrame:
    """Q16, parts/supplier relationship: how many suppliers could fill an order for such parts."""
    complained = t.supplier.filter(col.s_comment.str.contains("Customer.*Complaints"))
    return (
        t.part.filter(
            col.p_brand != "Brand#45",
            ~col.p_type.str.starts_with("MEDIUM POLISHED"),
            col.p_size.is_in([49, 14, 23, 45, 19, 3, 36, 9]),
        )
        .join(t.partsupp, left_on="p_partkey", right_on="ps_partkey")
        .join(complained, left_on="ps_suppkey", right_on="s_suppkey", how="anti")
        .group_by("p_brand", "p_type", "p_size")
        .agg(supplier_cnt=col.ps_suppkey.n_unique())
        .sort(
            "supplier_cnt",
            "p_brand",
            "p_type",
            "p_size",
            descending=[True, False, False, False],
        )
    )


def q17(t: Tables) -> pl.LazyFrame:
    """Q17, small-quantity-order revenue: what a year's small orders of such parts bring in."""
    lines = t.part.filter(col.p_brand == "Brand#23", col.p_container == "MED BOX").join(
        t.lineitem, left_on="p_partkey", right_on="l_partkey"
    )
    small = lines.group_by("p_partkey").agg(small=0.2 * col.l_quantity.mean())
    return (
        lines.join(small, on="p_partkey")
        .filter(col.l_quantity < col.small)
        .select(avg_yearly=_total(col.l_extendedprice) / 7.0)
    )


def q18(t: Tables) -> pl.LazyFrame:
    """Q18, large volume customer: orders of more than 300 pieces."""
    large = (
        t.lineitem.group_by("l_orderkey")
        .agg(sum_qty=col.l_quantity.sum())
        .filter(col.sum_qty > 300)
    )
    return (
        large.join(t.orders, left_on="l_orderkey", right_on="o_orderkey")
        .join(t.customer, left_on="o_custkey", right_on="c_custkey")
        .select(
            "c_name",
            col.o_custkey.alias("c_custkey"),
            col.l_orderkey.alias("o_orderkey"),
            "o_orderdate",
            "o_totalprice",
            "sum_qty",
        )
        .sort("o_totalprice", "o_orderdate", descending=[True, False])
        .head(100)
    )


def q19(t: Tables) -> pl.LazyFrame:
    """Q19, discounted revenue: three kinds of parts, shipped by air and delivered in person."""
    small = (
        (col.p_brand == "Brand#12")
        & col.p_container.is_in(["SM CASE", "SM BOX", "SM PACK", "SM PKG"])
        & col.l_quantity.is_between(1, 11)
        & col.p_size.is_between(1, 5)
    )
    medium = (
        (col.p_brand == "Brand#23")
        & col.p_container.is_in(["MED BAG", "MED BOX", "MED PKG", "MED PACK"])
        & col.l_quantity.is_between(10, 20)
        & col.p_size.is_between(1, 10)
    )
    large = (
        (col.p_brand == "Brand#34")
        & col.p_container.is_in(["LG CASE", "LG BOX", "LG PACK", "LG PKG"])
        & col.l_quantity.is_between(20, 30)
        & col.p_size.is_between(1, 15)
    )
    return (
        t.lineitem.filter(
            col.l_shipmode.is_in(["AIR", "AIR REG"]),
            col.l_shipinstruct == "DELIVER IN PERSON",
        )
        .join(t.part, left_on="l_partkey", right_on="p_partkey")
        .filter(small | medium | large)
        .select(revenue=_total(_REVENUE))
    )


def q20(t: Tables) -> pl.LazyFrame:
    """Q20, potential part promotion: Canadian suppliers with too much stock of forest parts."""
    forest = t.part.filter(col.p_name.str.starts_with("forest"))
    shipped = (
        t.lineitem.filter(
            col.l_shipdate.is_between(date(1994, 1, 1), date(1995, 1, 1), closed="left")
        )
        .group_by("l_partkey", "l_suppkey")
        .agg(half=0.5 * col.l_quantity.sum())
    )
    excess = (
        t.partsupp.join(forest, left_on="ps_partkey", right_on="p_partkey", how="semi")
        .join(
            shipped,
            left_on=["ps_partkey", "ps_suppkey"],
            right_on=["l_partkey", "l_suppkey"],
        )
        .filter(col.ps_availqty > col.half)
    )
    return (
        t.nation.filter(col.n_name == "CANADA")
        .join(t.supplier, left_on="n_nationkey", right_on="s_nationkey")
        .join(excess, left_on="s_suppkey", right_on="ps_suppkey", how="semi")
        .select("s_name", "s_address")
        .sort("s_name")
    )


def q21(t: Tables) -> pl.LazyFrame:
    """Q21, suppliers who kept orders waiting: alone late in an order of several suppliers."""
    late = t.lineitem.filter(col.l_receiptdate > col.l_commitdate)
    several = (
        t.lineitem.group_by("l_orderkey")
        .agg(suppliers=col.l_suppkey.n_unique())
        .filter(col.suppliers > 1)
    )
    one_late = (
        late.group_by("l_orderkey")
        .agg(late_suppliers=col.l_suppkey.n_unique())
        .filter(col.late_suppliers == 1)
    )
    return (
        t.nation.filter(col.n_name == "SAUDI ARABIA")
        .join(t.supplier, left_on="n_nationkey", right_on="s_nationkey")
        .join(late, left_on="s_suppkey", right_on="l_suppkey")
        .join(
            t.orders.filter(col.o_orderstatus == "F"),
            left_on="l_orderkey",
            right_on="o_orderkey",
            how="semi",
        )
        .join(several, on="l_orderkey", how="semi")
        .join(one_late, on="l_orderkey", how="semi")
        .group_by("s_name")
        .agg(numwait=pl.len())
        .sort("numwait", "s_name", descending=[True, False])
        .head(100)
    )


def q22(t: Tables) -> pl.LazyFrame:
    """Q22, global sales opportunity: customers in credit who have not ordered yet."""
    customers = t.customer.select(
        "c_custkey", "c_acctbal", cntrycode=col.c_phone.str.slice(0, 2)
    ).filter(col.cntrycode.is_in(["13", "31", "23", "29", "30", "18", "17"]))
    average = customers.filter(col.c_acctbal > 0).select(average=col.c_acctbal.mean())
    return (
        customers.join(average, how="cross")
        .filter(col.c_acctbal > col.average)
        .join(t.orders, left_on="c_custkey", right_on="o_custkey", how="anti")
        .group_by("cntrycode")
        .agg(numcust=pl.len(), totacctbal=col.c_acctbal.sum())
        .sort("cntrycode")
    )


QUERIES: Final[Mapping[int, Callable[[Tables], pl.LazyFrame]]] = dict(
    enumerate(
        (
            *(q1, q2, q3, q4, q5, q6, q7, q8, q9, q10, q11),
            *(q12, q13, q14, q15, q16, q17, q18, q19, q20, q21, q22),
        ),
        start=1,
    )
)
