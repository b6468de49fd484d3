// SPDX-License-Identifier: GPL-3.0-or-later

//go:build amd64 && !purego && gc

#include "textflag.h"

// ChaCha20 (RFC 8439) with one block of the cipher per 32-bit lane: vector i holds word i of the state of 8 (AVX2) or 16
// (AVX-512) blocks with consecutive counters. The rounds then need no moves between lanes; only at the end the words of each
// block are gathered by transposing.
//
// Both routines read and write whole strides only, read a stride's source before they write to the same place, keep no
// secret in memory but their stack frame, and take the same time whatever the data.

DATA lanes<>+0x00(SB)/4, $0
DATA lanes<>+0x04(SB)/4, $1
DATA lanes<>+0x08(SB)/4, $2
DATA lanes<>+0x0c(SB)/4, $3
DATA lanes<>+0x10(SB)/4, $4
DATA lanes<>+0x14(SB)/4, $5
DATA lanes<>+0x18(SB)/4, $6
DATA lanes<>+0x1c(SB)/4, $7
DATA lanes<>+0x20(SB)/4, $8
DATA lanes<>+0x24(SB)/4, $9
DATA lanes<>+0x28(SB)/4, $10
DATA lanes<>+0x2c(SB)/4, $11
DATA lanes<>+0x30(SB)/4, $12
DATA lanes<>+0x34(SB)/4, $13
DATA lanes<>+0x38(SB)/4, $14
DATA lanes<>+0x3c(SB)/4, $15
GLOBL lanes<>(SB), RODATA|NOPTR, $64

DATA eight<>+0x00(SB)/4, $8
GLOBL eight<>(SB), RODATA|NOPTR, $4

// Byte shuffles that turn every 32-bit word left by 16 and by 8 bits.
DATA rot16<>+0x00(SB)/8, $0x0504070601000302
DATA rot16<>+0x08(SB)/8, $0x0d0c0f0e09080b0a
DATA rot16<>+0x10(SB)/8, $0x0504070601000302
DATA rot16<>+0x18(SB)/8, $0x0d0c0f0e09080b0a
GLOBL rot16<>(SB), RODATA|NOPTR, $32

DATA rot8<>+0x00(SB)/8, $0x0605040702010003
DATA rot8<>+0x08(SB)/8, $0x0e0d0c0f0a09080b
DATA rot8<>+0x10(SB)/8, $0x0605040702010003
DATA rot8<>+0x18(SB)/8, $0x0e0d0c0f0a09080b
GLOBL rot8<>(SB), RODATA|NOPTR, $32

// TRANSPOSE4 transposes the 4×4 matrix of words in each 128-bit part of a, b, c, d, in place; t0 to t3 are spoiled. If the
// four held words w, w+1, w+2, w+3 of all blocks, then part p of a, b, c, d holds these four words of block 4p, 4p+1, 4p+2,
// 4p+3. The instructions exist in both widths.
#define TRANSPOSE4(a, b, c, d, t0, t1, t2, t3) \
	VPUNPCKLDQ  b, a, t0   \
	VPUNPCKHDQ  b, a, t1   \
	VPUNPCKLDQ  d, c, t2   \
	VPUNPCKHDQ  d, c, t3   \
	VPUNPCKLQDQ t2, t0, a  \
	VPUNPCKHQDQ t2, t0, b  \
	VPUNPCKLQDQ t3, t1, c  \
	VPUNPCKHQDQ t3, t1, d

// ---------------------------------------------------------------------------------------------------------------- AVX2

// TWOQUARTERS does two quarter rounds side by side, to hide the latency of each; t0 and t1 are spoiled. There is no rotate
// by any number before AVX-512, hence shuffles for 16 and 8, and shifts for 12 and 7.
#define TWOQUARTERS(a0, b0, c0, d0, a1, b1, c1, d1, t0, t1) \
	VPADDD  b0, a0, a0          \
	VPADDD  b1, a1, a1          \
	VPXOR   a0, d0, d0          \
	VPXOR   a1, d1, d1          \
	VPSHUFB rot16<>(SB), d0, d0 \
	VPSHUFB rot16<>(SB), d1, d1 \
	VPADDD  d0, c0, c0          \
	VPADDD  d1, c1, c1          \
	VPXOR   c0, b0, b0          \
	VPXOR   c1, b1, b1          \
	VPSLLD  $12, b0, t0         \
	VPSLLD  $12, b1, t1         \
	VPSRLD  $20, b0, b0         \
	VPSRLD  $20, b1, b1         \
	VPOR    t0, b0, b0          \
	VPOR    t1, b1, b1          \
	VPADDD  b0, a0, a0          \
	VPADDD  b1, a1, a1          \
	VPXOR   a0, d0, d0          \
	VPXOR   a1, d1, d1          \
	VPSHUFB rot8<>(SB), d0, d0  \
	VPSHUFB rot8<>(SB), d1, d1  \
	VPADDD  d0, c0, c0          \
	VPADDD  d1, c1, c1          \
	VPXOR   c0, b0, b0          \
	VPXOR   c1, b1, b1          \
	VPSLLD  $7, b0, t0          \
	VPSLLD  $7, b1, t1          \
	VPSRLD  $25, b0, b0         \
	VPSRLD  $25, b1, b1         \
	VPOR    t0, b0, b0          \
	VPOR    t1, b1, b1

// ADDWORD adds a word of the initial state to all lanes of r.
#define ADDWORD(offset, t, r) \
	VPBROADCASTD offset(BX), t \
	VPADDD       t, r, r

// OUT8 takes the lower four (a) and the upper four (b) of eight consecutive words of blocks j and j+4, joins them to half a
// block of the cipher each, and writes them xor the source; offset is that of the half, 0 or 32 bytes.
#define OUT8(a, b, t0, t1, j, offset) \
	VPERM2I128 $0x20, b, a, t0                  \
	VPERM2I128 $0x31, b, a, t1                  \
	VPXOR      (64*(j)+offset)(SI), t0, t0      \
	VPXOR      (64*((j)+4)+offset)(SI), t1, t1  \
	VMOVDQU    t0, (64*(j)+offset)(DI)          \
	VMOVDQU    t1, (64*((j)+4)+offset)(DI)

// func xorAVX2(dst, src *byte, strides int, state *[16]uint32)
//
// Words 0 to 7 live in Y0 to Y7, 12 to 15 in Y12 to Y15. Of words 8 to 11 only two are in Y8 and Y9 at a time, so that
// Y10 and Y11 are free; the other two wait in the frame:
//   0(SP) word 8, 32(SP) word 9, 64(SP) word 10, 96(SP) word 11, 128(SP) to 255(SP) words 12 to 15 while words 0 to 7 are
//   written out, 256(SP) the counters.
TEXT ·xorAVX2(SB), NOSPLIT, $288-32
	MOVQ         dst+0(FP), DI
	MOVQ         src+8(FP), SI
	MOVQ         strides+16(FP), CX
	MOVQ         state+24(FP), BX
	TESTQ        CX, CX
	JLE          done2
	VPBROADCASTD 48(BX), Y12
	VPADDD       lanes<>(SB), Y12, Y12
	VMOVDQU      Y12, 256(SP)

stride2:
	VPBROADCASTD 40(BX), Y8
	VPBROADCASTD 44(BX), Y9
	VMOVDQU      Y8, 64(SP)
	VMOVDQU      Y9, 96(SP)
	VPBROADCASTD 0(BX), Y0
	VPBROADCASTD 4(BX), Y1
	VPBROADCASTD 8(BX), Y2
	VPBROADCASTD 12(BX), Y3
	VPBROADCASTD 16(BX), Y4
	VPBROADCASTD 20(BX), Y5
	VPBROADCASTD 24(BX), Y6
	VPBROADCASTD 28(BX), Y7
	VPBROADCASTD 32(BX), Y8
	VPBROADCASTD 36(BX), Y9
	VMOVDQU      256(SP), Y12
	VPBROADCASTD 52(BX), Y13
	VPBROADCASTD 56(BX), Y14
	VPBROADCASTD 60(BX), Y15
	MOVQ         $10, AX

rounds2:
	// The column round with words 8 and 9, then with 10 and 11; the diagonal round starts with those two.
	TWOQUARTERS(Y0, Y4, Y8, Y12, Y1, Y5, Y9, Y13, Y10, Y11)
	VMOVDQU Y8, 0(SP)
	VMOVDQU Y9, 32(SP)
	VMOVDQU 64(SP), Y8
	VMOVDQU 96(SP), Y9
	TWOQUARTERS(Y2, Y6, Y8, Y14, Y3, Y7, Y9, Y15, Y10, Y11)
	TWOQUARTERS(Y0, Y5, Y8, Y15, Y1, Y6, Y9, Y12, Y10, Y11)
	VMOVDQU Y8, 64(SP)
	VMOVDQU Y9, 96(SP)
	VMOVDQU 0(SP), Y8
	VMOVDQU 32(SP), Y9
	TWOQUARTERS(Y2, Y7, Y8, Y13, Y3, Y4, Y9, Y14, Y10, Y11)
	DECQ    AX
	JNZ     rounds2

	// Add the initial state; words 8 to 15 go to the frame meanwhile.
	ADDWORD(32, Y10, Y8)
	ADDWORD(36, Y10, Y9)
	VMOVDQU      Y8, 0(SP)
	VMOVDQU      Y9, 32(SP)
	VMOVDQU      64(SP), Y8
	VMOVDQU      96(SP), Y9
	ADDWORD(40, Y10, Y8)
	ADDWORD(44, Y10, Y9)
	VMOVDQU      Y8, 64(SP)
	VMOVDQU      Y9, 96(SP)
	VMOVDQU      256(SP), Y10
	VPADDD       Y10, Y12, Y12
	VPBROADCASTD eight<>(SB), Y11
	VPADDD       Y11, Y10, Y10
	VMOVDQU      Y10, 256(SP)
	ADDWORD(52, Y10, Y13)
	ADDWORD(56, Y10, Y14)
	ADDWORD(60, Y10, Y15)
	VMOVDQU      Y12, 128(SP)
	VMOVDQU      Y13, 160(SP)
	VMOVDQU      Y14, 192(SP)
	VMOVDQU      Y15, 224(SP)
	ADDWORD(0, Y10, Y0)
	ADDWORD(4, Y10, Y1)
	ADDWORD(8, Y10, Y2)
	ADDWORD(12, Y10, Y3)
	ADDWORD(16, Y10, Y4)
	ADDWORD(20, Y10, Y5)
	ADDWORD(24, Y10, Y6)
	ADDWORD(28, Y10, Y7)

	// The first half of each block of the cipher, then the second.
	TRANSPOSE4(Y0, Y1, Y2, Y3, Y8, Y9, Y10, Y11)
	TRANSPOSE4(Y4, Y5, Y6, Y7, Y12, Y13, Y14, Y15)
	OUT8(Y0, Y4, Y8, Y9, 0, 0)
	OUT8(Y1, Y5, Y10, Y11, 1, 0)
	OUT8(Y2, Y6, Y12, Y13, 2, 0)
	OUT8(Y3, Y7, Y14, Y15, 3, 0)
	VMOVDQU 0(SP), Y0
	VMOVDQU 32(SP), Y1
	VMOVDQU 64(SP), Y2
	VMOVDQU 96(SP), Y3
	VMOVDQU 128(SP), Y4
	VMOVDQU 160(SP), Y5
	VMOVDQU 192(SP), Y6
	VMOVDQU 224(SP), Y7
	TRANSPOSE4(Y0, Y1, Y2, Y3, Y8, Y9, Y10, Y11)
	TRANSPOSE4(Y4, Y5, Y6, Y7, Y12, Y13, Y14, Y15)
	OUT8(Y0, Y4, Y8, Y9, 0, 32)
	OUT8(Y1, Y5, Y10, Y11, 1, 32)
	OUT8(Y2, Y6, Y12, Y13, 2, 32)
	OUT8(Y3, Y7, Y14, Y15, 3, 32)

	ADDQ       $512, DI
	ADDQ       $512, SI
	DECQ       CX
	JNZ        stride2
	VZEROUPPER

done2:
	RET

// ------------------------------------------------------------------------------------------------------------- AVX-512

// HALVES does half of four quarter rounds side by side: add, xor and rotate by r1; add, xor and rotate by r2.
#define HALVES(a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3, r1, r2) \
	VPADDD b0, a0, a0 \
	VPADDD b1, a1, a1 \
	VPADDD b2, a2, a2 \
	VPADDD b3, a3, a3 \
	VPXORD a0, d0, d0 \
	VPXORD a1, d1, d1 \
	VPXORD a2, d2, d2 \
	VPXORD a3, d3, d3 \
	VPROLD r1, d0, d0 \
	VPROLD r1, d1, d1 \
	VPROLD r1, d2, d2 \
	VPROLD r1, d3, d3 \
	VPADDD d0, c0, c0 \
	VPADDD d1, c1, c1 \
	VPADDD d2, c2, c2 \
	VPADDD d3, c3, c3 \
	VPXORD c0, b0, b0 \
	VPXORD c1, b1, b1 \
	VPXORD c2, b2, b2 \
	VPXORD c3, b3, b3 \
	VPROLD r2, b0, b0 \
	VPROLD r2, b1, b1 \
	VPROLD r2, b2, b2 \
	VPROLD r2, b3, b3

// OUT16 takes words 0-3, 4-7, 8-11, 12-15 (a, b, c, d) of blocks j, j+4, j+8, j+12 (one per 128-bit part), joins them to
// whole blocks of the cipher, and writes them xor the source; t0 to t3 are spoiled.
#define OUT16(a, b, c, d, t0, t1, t2, t3, j) \
	VSHUFI32X4 $0x44, b, a, t0          \
	VSHUFI32X4 $0xee, b, a, t1          \
	VSHUFI32X4 $0x44, d, c, t2          \
	VSHUFI32X4 $0xee, d, c, t3          \
	VSHUFI32X4 $0x88, t2, t0, a         \
	VSHUFI32X4 $0xdd, t2, t0, b         \
	VSHUFI32X4 $0x88, t3, t1, c         \
	VSHUFI32X4 $0xdd, t3, t1, d         \
	VPXORD     (64*(j))(SI), a, a       \
	VPXORD     (64*((j)+4))(SI), b, b   \
	VPXORD     (64*((j)+8))(SI), c, c   \
	VPXORD     (64*((j)+12))(SI), d, d  \
	VMOVDQU64  a, (64*(j))(DI)          \
	VMOVDQU64  b, (64*((j)+4))(DI)      \
	VMOVDQU64  c, (64*((j)+8))(DI)      \
	VMOVDQU64  d, (64*((j)+12))(DI)

// func xorAVX512(dst, src *byte, strides int, state *[16]uint32)
//
// Words 0 to 15 live in Z0 to Z15, the counters in Z31; Z30 is 16 in all lanes.
TEXT ·xorAVX512(SB), NOSPLIT, $0-32
	MOVQ         dst+0(FP), DI
	MOVQ         src+8(FP), SI
	MOVQ         strides+16(FP), CX
	MOVQ         state+24(FP), BX
	TESTQ        CX, CX
	JLE          done5
	VPBROADCASTD 48(BX), Z31
	VPADDD       lanes<>(SB), Z31, Z31
	MOVL         $16, AX
	VPBROADCASTD AX, Z30

stride5:
	VPBROADCASTD 0(BX), Z0
	VPBROADCASTD 4(BX), Z1
	VPBROADCASTD 8(BX), Z2
	VPBROADCASTD 12(BX), Z3
	VPBROADCASTD 16(BX), Z4
	VPBROADCASTD 20(BX), Z5
	VPBROADCASTD 24(BX), Z6
	VPBROADCASTD 28(BX), Z7
	VPBROADCASTD 32(BX), Z8
	VPBROADCASTD 36(BX), Z9
	VPBROADCASTD 40(BX), Z10
	VPBROADCASTD 44(BX), Z11
	VMOVDQA64    Z31, Z12
	VPBROADCASTD 52(BX), Z13
	VPBROADCASTD 56(BX), Z14
	VPBROADCASTD 60(BX), Z15
	MOVQ         $10, AX

rounds5:
	HALVES(Z0, Z4, Z8, Z12, Z1, Z5, Z9, Z13, Z2, Z6, Z10, Z14, Z3, Z7, Z11, Z15, $16, $12)
	HALVES(Z0, Z4, Z8, Z12, Z1, Z5, Z9, Z13, Z2, Z6, Z10, Z14, Z3, Z7, Z11, Z15, $8, $7)
	HALVES(Z0, Z5, Z10, Z15, Z1, Z6, Z11, Z12, Z2, Z7, Z8, Z13, Z3, Z4, Z9, Z14, $16, $12)
	HALVES(Z0, Z5, Z10, Z15, Z1, Z6, Z11, Z12, Z2, Z7, Z8, Z13, Z3, Z4, Z9, Z14, $8, $7)
	DECQ AX
	JNZ  rounds5

	VPADDD.BCST 0(BX), Z0, Z0
	VPADDD.BCST 4(BX), Z1, Z1
	VPADDD.BCST 8(BX), Z2, Z2
	VPADDD.BCST 12(BX), Z3, Z3
	VPADDD.BCST 16(BX), Z4, Z4
	VPADDD.BCST 20(BX), Z5, Z5
	VPADDD.BCST 24(BX), Z6, Z6
	VPADDD.BCST 28(BX), Z7, Z7
	VPADDD.BCST 32(BX), Z8, Z8
	VPADDD.BCST 36(BX), Z9, Z9
	VPADDD.BCST 40(BX), Z10, Z10
	VPADDD.BCST 44(BX), Z11, Z11
	VPADDD      Z31, Z12, Z12
	VPADDD.BCST 52(BX), Z13, Z13
	VPADDD.BCST 56(BX), Z14, Z14
	VPADDD.BCST 60(BX), Z15, Z15
	VPADDD      Z30, Z31, Z31

	TRANSPOSE4(Z0, Z1, Z2, Z3, Z16, Z17, Z18, Z19)
	TRANSPOSE4(Z4, Z5, Z6, Z7, Z20, Z21, Z22, Z23)
	TRANSPOSE4(Z8, Z9, Z10, Z11, Z16, Z17, Z18, Z19)
	TRANSPOSE4(Z12, Z13, Z14, Z15, Z20, Z21, Z22, Z23)
	OUT16(Z0, Z4, Z8, Z12, Z16, Z17, Z18, Z19, 0)
	OUT16(Z1, Z5, Z9, Z13, Z20, Z21, Z22, Z23, 1)
	OUT16(Z2, Z6, Z10, Z14, Z16, Z17, Z18, Z19, 2)
	OUT16(Z3, Z7, Z11, Z15, Z20, Z21, Z22, Z23, 3)

	ADDQ       $1024, DI
	ADDQ       $1024, SI
	DECQ       CX
	JNZ        stride5
	VZEROUPPER

done5:
	RET
