"""
Whether a plan gives the same answer each time it runs on the same data.

What is not known to do so does not: each variant that Polars names in the plan has to be listed
here. So what a later Polars adds, or was forgotten, only means that such queries are not shared.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

_WORDS: Final = """
Abs AddBusinessDay Agg AggGroups Alias All AllColumns AllHorizontal And Anti Any AnyHorizontal AnyOf
Append ApproxNUnique ApproxQuantile ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh ArgMax ArgMin
ArgSort ArgUnique ArgWhere Array ArrayAgg ArrayExpr AsList AsOf AsStruct Atan2 Auto Average Backward
Base64Decode Base64Encode BaseUtcOffset Bin Binary BinaryExpr Bitwise Boolean Both Breaks Business
BusinessDayCount ByDType ByIndex ByName Cache Cast CastTimeUnit Categorical Cbrt Ceil Century Clip
Coalesce CoalesceColumns Column Columns Combine Concat ConcatExpr ConcatHorizontal ConcatVertical
Contains ContainsAny ConvertTimeZone CorrCov Correlation Cos Cosh Cot Count CountMatches CountOnes
CountZeros Covariance Cross Csv CumCount CumMax CumMin CumProd CumSum Cumulative Cut DSTOffset
DataFrameScan DataPoint Date DateRange DateRanges Datetime DatetimeFunction DatetimeRange
DatetimeRanges Day DaysInMonth Decimal Degrees Dense Diff Difference Distinct Dot Drop DropNans
DropNulls Duration Dyn Element Empty EndsWith Entropy Enum Eq EqValidity Equi Equiprobable Erf Erfc
EscapeRegex Eval EwmMean EwmMeanBy EwmStd EwmSum EwmSumBy EwmVar ExclusiveOr Exp Explicit Explode
ExtContext ExtendConstant Extract ExtractAll ExtractGroups ExtractMany Field FieldByIndex
FieldByName FillNan FillNull FillNullWithStrategy Filter Find FindMany First Float Float32 Float64
Floor FloorDivide Forbid Format Forward Friday Full Function Gather GatherEvery Generic Get
GetCategories GroupBy GroupsToRows Gt GtEq HConcat HStack HalfAwayFromZero HalfToEven HasNulls Hash
Head HexDecode HexEncode Higher Hint Hist Hour IR Ignore Implode IndexOf Inner Insert Int Int128
Int16 Int32 Int64 Int8 IntRange IntRanges Integer Interpolate InterpolateBy Intersection Intervals
Ipc IsBetween IsBusinessDay IsClose IsDuplicated IsEmpty IsFinite IsFirstDistinct IsIn IsInfinite
IsLastDistinct IsLeapYear IsNan IsNotNan IsNotNull IsNull IsSorted IsUnique IsoYear Item Join
JoinSpecific JsonDecode JsonEncode JsonPathMatch KeepColumns KeepName Kurtosis Last LeadingOnes
LeadingZeros Left LeftRight Len LenBytes LenChars Length Linear LinearSpace LinearSpaces List
ListAgg ListExpr Literal Log Log1p LossyUtf8 Lower LowerBound Lowercase Lt LtEq ManyToMany ManyToOne
MapFieldNames MapFunction MatchToSchema Matches Max MaxBy MaxHorizontal Mean MeanBy MeanHorizontal
Median MergeSorted Microsecond Microseconds Midpoint Millennium Millisecond Milliseconds Min MinBy
MinHorizontal Minus Minute Mode Modulus Monday Month MonthEnd MonthStart Multiply NDJson NFC NFD
NFKC NFKD NUnique Nanosecond Nanoseconds Nearest Negate Nested NonEqui NonStrict None Normalize Not
NotEq NotEqValidity Null NullCount Numeric OPTIONAL_RE_ENTRANT OfExpr OffsetBy One OneToMany
OneToOne Or Ordinal OrdinalDay Over Overflowing PadEnd PadStart Parquet Paths PctChange PeakMax
PeakMin Pearson Physical Pivot Plus Positive Pow Prefiltered Prefix PrefixFields Product QCut
Quantile QuantileBy Quantiles Quarter RLE RLEID Radians Raise Range Rank RankBy Ranks Rechunk
Reinterpret Rename RenameAlias RenameFields Repeat RepeatBy Replace ReplaceMany ReplaceStrict
ReplaceTimeZone Reshape Reverse Right RightLeft Rolling RollingExpr RollingExprBy Round RoundSF
RowGroups RowIndex Saturday Scalar Scan SearchSorted Second Select SelectFields Selector Semi Series
SetOperation SetSortedFlag Shift Sign Sin Single Sinh Size Skew Slice Sort SortBy Sorted
SpearmanRank Specified Split SplitExact SplitN Sqrt StartEndInterval StartsWith Stats Std StdBy
Strict String StringExpr StripChars StripCharsEnd StripCharsStart StripPrefix StripSuffix Strptime
Struct StructEval StructExpr Suffix SuffixFields Sum SumBy SumHorizontal Sunday SymmetricDifference
Tail Tan Tanh Temporal TemporalExpr Ternary Thursday Time TimeRange TimeRanges TimeStamp Titlecase
ToArray ToDecimal ToInteger ToList ToLowercase ToPhysical ToString ToStruct ToUppercase TopK TopKBy
TotalDays TotalHours TotalMicroseconds TotalMilliseconds TotalMinutes TotalNanoseconds TotalSeconds
TrailingOnes TrailingZeros Trigonometry TrueDivide TruncDivide Truncate Tuesday U32 UInt128 UInt16
UInt32 UInt64 UInt8 UTC Union Unique UniqueCounts Unknown Unnest Unpivot UpperBound Uppercase Utf8
ValueCounts Var VarBy Wednesday Week WeekDay Wildcard WindowBound WithFields WithTimeUnit Xor Year
ZFill Zero
"""
_KNOWN: Final = frozenset(_WORDS.split())
_BYTES: Final = re.compile(rb"\[[\d,]{16,}\]")
"""The bytes of frames and series in memory, of which some may be left out."""
_VARIANT: Final = re.compile(r"[A-Z]\w*")
_NAMES: Final = frozenset({"Column", "Field", "inner", "names", "existing", "new", "fields"})
"""What has names of the user's, or a path, in it."""
_TEXTS: Final = frozenset({"name", "suffix", "prefix", "format", "row_index", "include_file_paths"})
"""What is a text of the user's."""


def is_repeatable(plan: bytes) -> bool:
    """Return whether all in `plan`, the JSON of a plan, is known to be the same in each run."""
    try:
        return _is_known(json.loads(_BYTES.sub(b"[]", plan)))
    except (ValueError, RecursionError):
        return False


def _is_known(node: Any) -> bool:
    if isinstance(node, dict):
        return all(_is_known_part(key, part) for key, part in node.items())
    if isinstance(node, list):
        return all(map(_is_known, node))
    return not isinstance(node, str) or _is_known_word(node)


def _is_known_part(key: str, part: Any) -> bool:
    if not _is_known_word(key):
        return False
    if key in _NAMES:
        return _names_only(part)
    if key == "Literal":
        return _is_known_literal(part)
    if key == "Alias" and isinstance(part, list):  # the expression, and its name
        return all(_is_known(each) for each in part if not isinstance(each, str))
    return (key in _TEXTS and isinstance(part, str)) or _is_known(part)


def _names_only(part: Any) -> bool:
    """Return whether `part` is a name, a list of names, or types by their names."""
    if isinstance(part, dict):
        return all(map(_is_known, part.values()))
    if isinstance(part, list):
        return all(_names_only(each) for each in part)
    return part is None or isinstance(part, str)


def _is_known_literal(part: Any) -> bool:
    """Return whether a literal has nothing but known kinds of values; texts are values."""
    if isinstance(part, dict):
        return all(_is_known_word(key) and _is_known_literal(each) for key, each in part.items())
    if isinstance(part, list):
        return all(map(_is_known_literal, part))
    return True


def _is_known_word(word: str) -> bool:
    return word in _KNOWN or _VARIANT.fullmatch(word) is None
