"""The three kernels of the probes, in PTX, so that no compiler is needed."""

from __future__ import annotations

_PTX = """
.version {version}
.target sm_{target}
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{{
    .reg .u64 %start, %now, %length;
    .reg .pred %more;
    ld.param.u64 %length, [nanoseconds];
    mov.u64 %start, %globaltimer;
AGAIN:
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %start;
    setp.lt.u64 %more, %now, %length;
    @%more bra AGAIN;
    ret;
}}
.visible .entry nothing()
{{
    ret;
}}
.visible .entry move(.param .u64 target, .param .u64 source)
{{
    .reg .u64 %to, %from;
    .reg .u32 %word;
    ld.param.u64 %to, [target];
    ld.param.u64 %from, [source];
    cvta.to.global.u64 %to, %to;
    cvta.to.global.u64 %from, %from;
    ld.global.u32 %word, [%from];
    st.global.u32 [%to], %word;
    ret;
}}
"""
"""``spin(ns)`` runs so long by the device's clock; ``nothing()``; ``move(to, from)`` moves one 32-bit word."""


def ptx(major: int, minor: int) -> bytes:
    """The kernels for a device; the oldest language that knows it, so that an old driver takes it too."""
    capability = 10 * major + minor
    for target, version in ((90, "7.8"), (80, "7.0"), (75, "6.3"), (70, "6.0")):
        if capability >= target:
            return _PTX.format(version=version, target=target).encode()
    return _PTX.format(version="6.0", target=60).encode()
