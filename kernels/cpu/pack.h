// Writes weights into the layout of LinearShape: plain rows of any floating type, and int8 and int4 rows with scales.
#pragma once

#include "group_tile.h"

// One element of a packed weight; `lane` is the column inside the panel.
INLINE char* packed_element(char* panel, const LinearShape& shape, int chunk, int64_t k, int64_t lane) {
  char* begin = panel + shape.chunk_bytes[chunk];
  k -= shape.bounds[chunk];
  if (shape.dtype == kFloat32) return begin + k * kVectorBytes + lane * 4;
  return begin + k / 2 * kVectorBytes + lane * 4 + k % 2 * 2;
}

// Writes columns [k, bounds[chunk + 1]) of the given rows, lanes `lane`... of the panel, element by element.
INLINE void pack_elements(char* panel, const LinearShape& shape, int chunk, int64_t k, int64_t lane,
                          const void* rows_NK, int64_t row_stride, int dtype, int64_t row, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t i = k; i < shape.bounds[chunk + 1]; ++i) {
      char* out = packed_element(panel, shape, chunk, i, lane + r);
      const float value = read_float(rows_NK, (row + r) * row_stride + i, dtype);
      if (shape.dtype == kFloat32) {
        __builtin_memcpy(out, &value, sizeof value);
      } else {
        // An even k clears its odd neighbour, which comes next or is the padding of a chunk of odd length.
        const uint32_t half = bf16_of(value);
        __builtin_memcpy(out, &half, (i - shape.bounds[chunk]) % 2 ? 2 : 4);
      }
    }
  }
}

// Rows of a whole panel that have its type already: columns [k, k_end) of a chunk, transposed 16 x 16 words at a time.
// `rows` points to column k. Returns the first k left to do.
INLINE int64_t pack_blocks(char* panel, const LinearShape& shape, int chunk, int64_t k, int64_t k_end, const char* rows,
                           int64_t row_stride) {
  const int64_t per_word = shape.dtype == kFloat32 ? 1 : 2, blocks = (k_end - k) / per_word / kLanes;
  const uint32_t* row[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    row[r] = reinterpret_cast<const uint32_t*>(rows + r * row_stride * (4 / per_word));
  }
  uint32_t* out = reinterpret_cast<uint32_t*>(packed_element(panel, shape, chunk, k, 0));
  for (int64_t i = 0; i < blocks; ++i) transpose16(row, i * kLanes, out + i * kLanes * kLanes);
  return k + blocks * kLanes * per_word;
}

template <int FROM, int TO>
INLINE void convert_row(const void* row, int64_t k, int64_t n, void* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = read_float(row, k + i, FROM);
    if constexpr (TO == kFloat32) static_cast<float*>(out)[i] = value;
    else static_cast<uint16_t*>(out)[i] = bf16_of(value);
  }
}

// Rows of a whole panel, of any type, through a buffer that stays in the L1 cache. Returns the first k left to do.
template <int FROM, int TO>
int64_t pack_converted(char* panel, const LinearShape& shape, int chunk, const char* rows, int64_t row_stride) {
  constexpr int64_t kColumns = 256, kElement = TO == kFloat32 ? 4 : 2;
  alignas(64) char buffer[kLanes * kColumns * kElement];
  const int64_t k_end = shape.bounds[chunk + 1];
  int64_t k = shape.bounds[chunk], done = -1;
  while (k != done) {
    const int64_t n = least(kColumns, k_end - k);
    for (int r = 0; r < kLanes; ++r) {
      const char* row = rows + r * row_stride * (FROM == kFloat32 ? 4 : 2);
      convert_row<FROM, TO>(row, k, n, buffer + r * kColumns * kElement);
    }
    done = k;
    k = pack_blocks(panel, shape, chunk, k, k + n, buffer, kColumns);
  }
  return k;
}

INLINE int64_t pack_whole_panel(char* panel, const LinearShape& shape, int chunk, const char* rows, int64_t row_stride,
                                int dtype) {
  const int64_t begin = shape.bounds[chunk], end = shape.bounds[chunk + 1];
  if (dtype == shape.dtype) {
    return pack_blocks(panel, shape, chunk, begin, end, rows + begin * (dtype == kFloat32 ? 4 : 2), row_stride);
  }
  if (shape.dtype == kBFloat16) {
    return dtype == kFloat32 ? pack_converted<kFloat32, kBFloat16>(panel, shape, chunk, rows, row_stride)
                             : pack_converted<kFloat16, kBFloat16>(panel, shape, chunk, rows, row_stride);
  }
  return dtype == kBFloat16 ? pack_converted<kBFloat16, kFloat32>(panel, shape, chunk, rows, row_stride)
                            : pack_converted<kFloat16, kFloat32>(panel, shape, chunk, rows, row_stride);
}

// Calls body(panel's storage, begin, end) for every panel that the rows have a part of.
template <class Body>
void for_each_panel(Pool* pool, const PackedRows& to, const Body& body) {
  const int64_t row_end = to.row_start + to.num_rows, first = to.row_start / kLanes;
  parallel_for(pool, ceil_div(row_end, kLanes) - first, 1, [&](int64_t index, int64_t) {
    const int64_t panel = first + index, begin = panel * kLanes < to.row_start ? to.row_start : panel * kLanes;
    body(static_cast<char*>(to.weight) + panel * to.shape->panel_bytes, begin, least((panel + 1) * kLanes, row_end));
  });
}

int pack_rows(Pool* pool, const PackRowsArgs& args) {
  const LinearShape& shape = *args.to.shape;
  const int64_t stride = args.row_stride, element = args.dtype == kFloat32 ? 4 : 2;
  const int dtype = static_cast<int>(args.dtype);
  for_each_panel(pool, args.to, [&](char* out, int64_t begin, int64_t end) {
    const int64_t row = begin - args.to.row_start;
    const char* rows = static_cast<const char*>(args.rows_NK) + row * stride * element;
    for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
      int64_t k = shape.bounds[chunk];
      if (end - begin == kLanes) k = pack_whole_panel(out, shape, chunk, rows, stride, dtype);
      pack_elements(out, shape, chunk, k, begin % kLanes, args.rows_NK, stride, dtype, row, end - begin);
    }
  });
  return kOk;
}

// The part of one panel that num_rows rows from `lane` on make up; q and scales point to the first of them.
template <int DT>
void pack_groups(char* panel, const LinearShape& shape, int lane, int num_rows, const int8_t* q, int64_t q_stride,
                 const uint16_t* scales, int64_t scale_stride) {
  using F = GroupFormat<DT>;
  for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
    char* out = panel + shape.chunk_bytes[chunk];
    const int64_t end = shape.bounds[chunk + 1];
    for (int64_t k = shape.bounds[chunk]; k < end; k += kGroup, out += F::kBytes) {
      const int64_t n = least(kGroup, end - k);
      for (int r = 0; r < num_rows; ++r) {
        const int column = lane + r;
        int8_t values[kGroup] = {};
        __builtin_memcpy(values, q + r * q_stride + k, n);
        __builtin_memcpy(out + column * 2, scales + r * scale_stride + k / kGroup, 2);
        for (int step = 0; step < F::kSteps; ++step) {
          char* word = out + (1 + step) * 32;
          if constexpr (DT == kInt8) {
            __builtin_memcpy(word + column * 2, values + 2 * step, 2);
          } else {
            const int shift = column / 8 * 4;
            for (int i = 0; i < 4; ++i) {
              uint8_t* byte = reinterpret_cast<uint8_t*>(word) + column % 8 * 4 + i;
              const int kept = *byte & (0xf0 >> shift), nibble = (values[4 * step + i] + 8) & 0x0f;
              *byte = static_cast<uint8_t>(kept | nibble << shift);
            }
          }
        }
      }
    }
  }
}

int pack_quantized(Pool* pool, const PackQuantizedArgs& args) {
  const auto pack = args.to.shape->dtype == kInt8 ? pack_groups<kInt8> : pack_groups<kInt4>;
  for_each_panel(pool, args.to, [&](char* out, int64_t begin, int64_t end) {
    const int lane = static_cast<int>(begin % kLanes), count = static_cast<int>(end - begin);
    const int64_t row = begin - args.to.row_start;
    pack(out, *args.to.shape, lane, count, args.q_NK + row * args.q_stride, args.q_stride,
         args.scales_NG + row * args.scale_stride, args.scale_stride);
  });
  return kOk;
}
