// Products with bf16 operands and fp32 sums on a processor's matrix unit (Intel AMX), of matrices that are kept in fp32.
//
// A tile holds 16 rows of 16 words, a word being two bf16 numbers that follow each other along the summed index k.
// Tiles of A have a row of C per row, tiles of B a pair of k per row and a column of C per word.

#pragma once

#include "products.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define ATLAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Operand {
    const float* p;
    I ld;
    bool transposed;  // as it lies in memory: A as (k, row), B as (column, k)
};

#if defined(ATLAS_AMX)

// The kernel grants a process the unit's registers when it asks; false where it does not.
bool narrow_available() {
    constexpr int REQUEST = 0x1023, TILES = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return granted;
}

struct alignas(64) TileConfiguration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler does not know that the unit reads and writes memory.
#define ATLAS_FENCE(ADDRESS) __asm__ volatile("" : : "r"(ADDRESS) : "memory")

// Sets eight full tiles, and afterwards what other libraries had set in this thread.
struct MatrixUnit {
    TileConfiguration before;
    MatrixUnit() {
        if (!narrow_available()) return;
        TileConfiguration ours;
        ours.palette = 1;
        for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = 16;
        _tile_storeconfig(&before);
        ATLAS_FENCE(&before);
        ATLAS_FENCE(&ours);
        _tile_loadconfig(&ours);
    }
    ~MatrixUnit() {
        if (!narrow_available()) return;
        ATLAS_FENCE(&before);
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
};

typedef __m512i Words;

// Words (x[i], y[i]) of two rows of 16 numbers
inline Words pair_rows(__m512 x, __m512 y) {
    alignas(64) static const uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (Words)_mm512_cvtne2ps_pbh(y, x));
}

inline __mmask16 first(I count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

inline void transpose_words(Words* x) {
    for (int step = 1; step < 16; step *= 2) {
        Words z[16];
        for (int i = 0; i < 8; i++) {
            auto a = (typename Vec<float>::type)x[i], b = (typename Vec<float>::type)x[i + 8];
            interleave<float>(a, b);
            z[2 * i] = (Words)a, z[2 * i + 1] = (Words)b;
        }
        for (int i = 0; i < 16; i++) x[i] = z[i];
    }
}

// One tile: 16 `outer` (rows of A, columns of B) by 32 k. `along`: k lies along a row in memory.
template <bool KEEP> void pack_tile(const float* p, I ld, bool along, I outer, I k, float sign, Words* to) {
    Words x[16];
    const __m512 by = _mm512_set1_ps(sign);
    if (along) {
        __mmask16 low = first(k), high = first(k - 16);
        for (I i = 0; i < 16; i++) {
            if (i >= outer) {
                x[i] = _mm512_setzero_si512();
                continue;
            }
            __m512 a = _mm512_maskz_loadu_ps(low, p + i * ld), b = _mm512_maskz_loadu_ps(high, p + i * ld + 16);
            x[i] = (Words)_mm512_cvtne2ps_pbh(_mm512_mul_ps(b, by), _mm512_mul_ps(a, by));
        }
        if (!KEEP) transpose_words(x);
    } else {
        __mmask16 some = first(outer);
        for (I i = 0; i < 16; i++) {
            __m512 a = 2 * i < k ? _mm512_maskz_loadu_ps(some, p + 2 * i * ld) : _mm512_setzero_ps();
            __m512 b = 2 * i + 1 < k ? _mm512_maskz_loadu_ps(some, p + (2 * i + 1) * ld) : _mm512_setzero_ps();
            x[i] = pair_rows(_mm512_mul_ps(a, by), _mm512_mul_ps(b, by));
        }
        if (KEEP) transpose_words(x);
    }
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i, x[i]);
}

// Tiles [outer / 16][k / 32]. KEEP: rows of a tile are `outer` (A); otherwise pairs of k (B).
template <bool KEEP> void pack(const Operand& x, I outer, I k, float sign, Words* to) {
    bool along = KEEP != x.transposed;
    for (I i = 0; i < outer; i += 16)
        for (I j = 0; j < k; j += 32, to += 16)
            pack_tile<KEEP>(along ? x.p + i * x.ld + j : x.p + j * x.ld + i, x.ld, along, outer - i, k - j, sign, to);
}

// The compiler wants the numbers of tiles literally.
#define ATLAS_BEGIN(TILE, C, LDC, ROWS, ADD)                                        \
    if (!(ADD)) {                                                                   \
        _tile_zero(TILE);                                                           \
    } else if ((ROWS) >= 16) {                                                      \
        _tile_loadd(TILE, (C), (LDC) * 4);                                          \
    } else {                                                                        \
        alignas(64) float part[256] = {};                                           \
        for (I r = 0; r < (ROWS); r++) memcpy(part + 16 * r, (C) + r * (LDC), 64);  \
        ATLAS_FENCE(part);                                                          \
        _tile_loadd(TILE, part, 64);                                                \
    }
#define ATLAS_FINISH(TILE, C, LDC, ROWS)                                            \
    if ((ROWS) >= 16) {                                                             \
        _tile_stored(TILE, (C), (LDC) * 4);                                         \
    } else {                                                                        \
        alignas(64) float part[256];                                                \
        _tile_stored(TILE, part, 64);                                               \
        ATLAS_FENCE(part);                                                          \
        for (I r = 0; r < (ROWS); r++) memcpy((C) + r * (LDC), part + 16 * r, 64);  \
    }

// C = [C +] alpha A B, of (M, K) and (K, N); alpha is 1 or −1. Whole vectors of C are written.
void narrow_product(I M, I N, I K, Operand A, Operand B, float* c, I ldc, float alpha, bool add) {
    struct alignas(64) Tile {
        char bytes[1024];
    };
    static thread_local std::vector<Tile> room;
    I deep = (K + 31) / 32, tall = (M + 15) / 16, broad = (N + 15) / 16;
    if (I(room.size()) < (tall + broad) * deep) room.resize((tall + broad) * deep);
    Words *a = (Words*)room.data(), *b = a + tall * deep * 16;
    pack<true>(A, M, K, alpha, a);
    pack<false>(B, N, K, 1, b);
    ATLAS_FENCE(a);
    for (I j = 0; j < broad; j += 2)
        for (I i = 0; i < tall; i += 2) {
            float* to = c + i * 16 * ldc + j * 16;
            I rows = M - i * 16;
            bool below = i + 1 < tall, beside = j + 1 < broad;
            float *right = to + 16, *low = to + 16 * ldc, *corner = low + 16;
            ATLAS_BEGIN(0, to, ldc, rows, add)
            if (beside) {
                ATLAS_BEGIN(1, right, ldc, rows, add)
            }
            if (below) {
                ATLAS_BEGIN(2, low, ldc, rows - 16, add)
            }
            if (below && beside) {
                ATLAS_BEGIN(3, corner, ldc, rows - 16, add)
            }
            const Words *a0 = a + i * deep * 16, *a1 = a0 + deep * 16, *b0 = b + j * deep * 16, *b1 = b0 + deep * 16;
            for (I k = 0; k < deep * 16; k += 16) {
                _tile_loadd(4, a0 + k, 64);
                _tile_loadd(6, b0 + k, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (beside) {
                    _tile_loadd(7, b1 + k, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (below) {
                    _tile_loadd(5, a1 + k, 64);
                    _tile_dpbf16ps(2, 5, 6);
                }
                if (below && beside) _tile_dpbf16ps(3, 5, 7);
            }
            ATLAS_FINISH(0, to, ldc, rows)
            if (beside) {
                ATLAS_FINISH(1, right, ldc, rows)
            }
            if (below) {
                ATLAS_FINISH(2, low, ldc, rows - 16)
            }
            if (below && beside) {
                ATLAS_FINISH(3, corner, ldc, rows - 16)
            }
        }
    ATLAS_FENCE(c);
}

#else

bool narrow_available() { return false; }
struct MatrixUnit {
    MatrixUnit() {}
};
void narrow_product(I, I, I, Operand, Operand, float*, I, float, bool) {}

#endif

}  // namespace
