//! Small kernels for tests of the driver, as PTX.

#![allow(dead_code, reason = "every test file uses a part of it")]

/// `add(u32* data, u32 term)`: each thread of one block adds to its word. `triple(u32* word)`: of one thread. `spin(u32*
/// flag)`: until the flag is not 0.
pub const SMALL: &str = r"
.version 8.2
.target sm_80
.address_size 64

.visible .entry add(.param .u64 add_param_0, .param .u32 add_param_1)
{
    .reg .b32 %r<5>;
    .reg .b64 %rd<5>;
    ld.param.u64 %rd1, [add_param_0];
    ld.param.u32 %r1, [add_param_1];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r2, %tid.x;
    mul.wide.u32 %rd3, %r2, 4;
    add.s64 %rd4, %rd2, %rd3;
    ld.global.u32 %r3, [%rd4];
    add.s32 %r4, %r3, %r1;
    st.global.u32 [%rd4], %r4;
    ret;
}

.visible .entry triple(.param .u64 triple_param_0)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [triple_param_0];
    ld.global.u32 %r1, [%rd1];
    mul.lo.s32 %r2, %r1, 3;
    st.global.u32 [%rd1], %r2;
    ret;
}

.visible .entry spin(.param .u64 spin_param_0)
{
    .reg .pred %p<2>;
    .reg .b32 %r<2>;
    .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [spin_param_0];
$L__BB1_1:
    ld.acquire.sys.global.u32 %r1, [%rd1];
    setp.eq.s32 %p1, %r1, 0;
    @%p1 bra $L__BB1_1;
    ret;
}
";
