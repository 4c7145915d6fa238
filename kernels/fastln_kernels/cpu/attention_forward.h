// The forward pass of attention.cpp, and what its backward shares: how products of rows become scores.
#pragma once

#include <cmath>
#include <limits>

#include "dispatch.h"
#include "dots.h"
#include "dropout.h"
#include "functions.h"
#include "heads.h"
#include "parallel.h"
#include "products.h"
#include "vector.h"

namespace fastln {
namespace {

constexpr int64_t QUERIES = 64;  // per block
constexpr int64_t MOST_KEYS = 320;  // per block
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float HIDDEN = -1e30f;  // lower scores come from a mask that added the lowest number of its dtype
constexpr int DEAD_EXPONENT = 100;

}  // namespace

// Same layout as native_attention._Arguments. A null pointer means that the tensor is absent or not requested.
struct Arguments {
  int64_t dtype, compute_dtype, int8, n_threads, batches, heads, kv_heads, queries, keys, dim, v_dim;
  int64_t causal, mask_dtype, threshold;
  const int64_t* seed;
  double scale;
  Rows q, k, v, mask, out, dout, dq, dk, dv;
  float* lse;
  const Rounding *out_rounding, *dq_rounding, *dk_rounding, *dv_rounding;  // where rows are written in 8 bits too
};

namespace {

constexpr int64_t BOOLEAN_MASK = 3;  // after the dtypes of dispatch.h

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The number of keys per block. Blocks have about equal sizes, so that none has only a few keys.
int64_t keys_of_a_block(int64_t keys) {
  const int64_t n_blocks = std::max<int64_t>((keys + MOST_KEYS - 1) / MOST_KEYS, 1);
  return std::max(round_up((keys + n_blocks - 1) / n_blocks, 2 * PAD), 2 * PAD);
}

// The stored lse of a dead row: all its scores lie below HIDDEN, and it counts as `count` equal scores. It stores only
// the count, because a float32 cannot hold both the score and the count.
float lse_of_dead_row(float count) { return std::ldexp(count, DEAD_EXPONENT); }
bool is_dead_row(float lse) { return lse >= std::ldexp(1.0f, DEAD_EXPONENT); }

// Replaces the scores of a dead row, so that they give its softmax together with the returned lse.
float revive(float* scores, int64_t n_cols, float lse) {
  for (int64_t column = 0; column < n_cols; column += LANES) {
    const Float score = load(scores + column, AllLanes{});
    store(scores + column, select(score > -INFINITE, Float{}, score), AllLanes{});
  }
  return std::log(std::ldexp(lse, -DEAD_EXPONENT));
}

// Where to write what replaces `numbers`: there, if it has their size, which halves what must stay in the cache.
template <class C>
C* in_place(float* numbers, Buffer<C>& buffer, int64_t size) {
  if constexpr (std::is_same_v<C, float>) return numbers;
  return buffer.at_least(size);
}

// One head of queries. Rows are T, products C; those of rows with rows (q k^T, do v^T) are R, which is C or int8_t.
template <class T, class C, class R>
class Head {
 public:
  Head(const Arguments& arguments, const Dropout& dropout, int64_t batch, int64_t head)
      : a_(arguments), dropout_(dropout), batch_(batch), head_(head) {}

  // The maximum number of keys, starting at `first`, that a block's queries can see.
  int64_t visible(int64_t first_query, int64_t n_queries, int64_t first) const {
    const int64_t end = a_.causal ? std::min(a_.keys, first_query + n_queries) : a_.keys;
    return std::clamp<int64_t>(end - first, 0, block_keys_);
  }

  // How the products of a row become scores: times a factor, plus the mask if there is one. Keys from `seen` on are hidden.
  struct Row {
    float factor;
    const float* mask;
    int64_t seen;

    // `values` reads the products.
    template <class Values>
    Float score(const Values& values, const float* products, int64_t column) const {
      Float score = values(products, column, factor);
      if (mask) score += load(mask + column, AllLanes{});
      if (column + LANES > seen) {
        const Float lane = lane_numbers() + static_cast<float>(column);
        score = select(lane < broadcast(static_cast<float>(seen)), score, broadcast(-INFINITE));
      }
      return score;
    }
  };

  // Row `left` of the products with keys from `first` on. The mask is valid until the next call with the same `place`.
  Row row(const Dots<T, R>& dots, int64_t left, int64_t query, int64_t first, int64_t n_cols, int place) const {
    if (query >= a_.queries) return {0, nullptr, 0};
    const int64_t seen = std::min(n_cols, (a_.causal ? std::min(a_.keys, query + 1) : a_.keys) - first);
    return {dots.factor(left) * static_cast<float>(a_.scale), mask_row(query, first, n_cols, place),
            std::max<int64_t>(seen, 0)};
  }

  // Turns products into scores and returns the largest.
  template <class Values>
  float finish_row(const Row& row, const Values& values, float* scores, int64_t n_cols) const {
    Float top = broadcast(-INFINITE);
    int64_t column = 0;
    for (; column < row.seen; column += LANES) {
      const Float score = row.score(values, scores, column);
      store(scores + column, score, AllLanes{});
      top = maximum(score, top);
    }
    for (; column < n_cols; column += LANES) store(scores + column, broadcast(-INFINITE), AllLanes{});
    return largest(top);
  }

  int64_t number() const { return head_; }

  const uint16_t* numbers(int64_t query, int64_t first, int64_t n_cols, int place) const {
    if (!dropout_.active()) return nullptr;
    return dropout_.draw((batch_ * a_.heads + head_) * a_.queries + query, n_cols, place, first);
  }

  void forward(HeadRounding& rounding) const {
    struct Space {
      Buffer<C> values, p;
      Buffer<float> scores, sums;
      Dots<T, R> dots;
    };
    thread_local Space thread_space;
    Space& space = thread_space;  // looked up once
    Dots<T, R>& dots = space.dots;
    const int64_t dim = round_up(a_.dim, 2 * PAD), v_dim = round_up(a_.v_dim, 2 * PAD);
    const int64_t n_blocks = (a_.keys + block_keys_ - 1) / block_keys_, kv_head = head_ / (a_.heads / a_.kv_heads);
    dots.resize(QUERIES, n_blocks * block_keys_, block_keys_, a_.dim, dim);
    dots.centre(a_.k.at<const T>(batch_, kv_head, 0), a_.k.row, a_.keys);
    C* values = space.values.at_least(n_blocks * block_keys_ * v_dim);
    float* scores = space.scores.at_least(QUERIES * block_keys_);
    C* p = in_place(scores, space.p, QUERIES * block_keys_);
    float* out = space.sums.at_least(QUERIES * v_dim);
    for (int64_t block = 0; block < n_blocks; block++) {
      const int64_t first = block * block_keys_, n_keys = std::min(block_keys_, a_.keys - first);
      dots.put_right(a_.k.at<const T>(batch_, kv_head, first), a_.k.row, n_keys, first);
      pair_rows(a_.v.at<const T>(batch_, kv_head, first), a_.v.row, n_keys, a_.v_dim, values + first * v_dim, v_dim);
    }
    for (int64_t first_query = 0; first_query < a_.queries; first_query += QUERIES) {
      const int64_t n_queries = std::min(QUERIES, a_.queries - first_query);
      dots.put_left(a_.q.at<const T>(batch_, head_, first_query), a_.q.row, n_queries, 0);
      float top[QUERIES], sums[QUERIES];
      for (int64_t first = 0; first < a_.keys; first += block_keys_) {
        const int64_t n_cols = padded(visible(first_query, n_queries, first));
        if (!n_cols) break;
        dots.multiply(padded(n_queries), n_cols, 0, first, scores);
        // The products skip no row. What another call left there may be numbers that are slow to multiply.
        std::memset(static_cast<void*>(p + n_queries * block_keys_), 0,
                    (padded(n_queries) - n_queries) * block_keys_ * sizeof(C));
        for (int64_t row = 0; row < n_queries; row++) {
          float* row_scores = scores + row * block_keys_;
          const Row of = this->row(dots, row, first_query + row, first, n_cols, 0);
          float new_top = finish_row(of, dots.values(first), row_scores, n_cols);
          float before = 0;
          if (first) {
            new_top = std::max(new_top, top[row]);
            before = new_top > -INFINITE ? std::exp(top[row] - new_top) : 1;
            float* sum = out + row * v_dim;
            for (int64_t column = 0; column < v_dim && before != 1; column += LANES)
              store(sum + column, load(sum + column, AllLanes{}) * before, AllLanes{});
          }
          const float sum = exponentials(row_scores, new_top > -INFINITE ? new_top : 0, p + row * block_keys_,
                                         numbers(first_query + row, first, n_cols, 0), n_cols);
          sums[row] = (first ? sums[row] * before : 0) + sum;
          top[row] = new_top;
        }
        multiply(padded(n_queries), padded(a_.v_dim), n_cols, p, block_keys_, values + first * v_dim, v_dim, out,
                 v_dim, first > 0);
      }
      for (int64_t row = 0; row < n_queries; row++) {
        const float sum = sums[row], factor = sum != 0 ? dropout_.scale() / sum : 0;
        T* to = a_.out.at<T>(batch_, head_, first_query + row);
        prefetch_row<T, true>(to + AHEAD * a_.out.row, a_.v_dim);
        for_columns(a_.v_dim, [&](int64_t column, auto lanes) {
          store(to + column, load(out + row * v_dim + column, lanes) * factor, lanes);
        });
        float lse = sum != 0 ? top[row] + std::log(sum) : 0;
        if (sum != 0 && top[row] < HIDDEN) lse = lse_of_dead_row(sum);
        a_.lse[(batch_ * a_.heads + head_) * a_.queries + first_query + row] = lse;
      }
      rounding.wrote<T>(batch_, first_query);
    }
    release<C>();
  }

 private:
  // The mask's row in float32, to add to the scores; null if there is no mask. Lanes beyond the keys may hold anything.
  const float* mask_row(int64_t query, int64_t first, int64_t n_cols, int place) const {
    if (!a_.mask.data) return nullptr;
    thread_local Buffer<float> buffers[2];
    float* to = buffers[place].at_least(block_keys_);
    n_cols = std::min(n_cols, a_.keys - first);
    // Queries often share their mask.
    const MaskRow wanted{a_.mask.row ? query : 0, first, n_cols};
    if (wanted == held_[place]) return to;
    held_[place] = wanted;
    if (a_.mask_dtype == BOOLEAN_MASK) {
      const auto* from = a_.mask.at<const uint8_t>(batch_, head_, query) + first;
      for (int64_t column = 0; column < n_cols; column++) to[column] = from[column] ? 0 : -INFINITE;
    } else {
      with_dtype(a_.mask_dtype, [&](auto type) {
        const auto* from = a_.mask.at<const decltype(type)>(batch_, head_, query) + first;
        for_columns(n_cols, [&](int64_t column, auto lanes) { store(to + column, load(from + column, lanes), lanes); });
      });
    }
    return to;
  }

  // Writes e^(score - top), or 0 for dropped elements, and returns the sum over all elements, including dropped ones.
  float exponentials(const float* scores, float top, C* to, const uint16_t* numbers, int64_t n_cols) const {
    Sum sums;
    sum_columns(n_cols, [&](int64_t column, auto, int part) {
      Float value = exponential_for(load(scores + column, AllLanes{}) - top, T{});
      sums.parts[part] += value;
      if (numbers) value = dropout_.keep(value, numbers + column);
      store(to + column, value, AllLanes{});
    });
    return sums.total();
  }

  struct MaskRow {
    int64_t query, first, n_cols;

    bool operator==(const MaskRow& other) const {
      return query == other.query && first == other.first && n_cols == other.n_cols;
    }
  };

  const Arguments& a_;
  const Dropout& dropout_;
  const int64_t batch_, head_, block_keys_ = keys_of_a_block(a_.keys);
  mutable MaskRow held_[2] = {{-1, 0, 0}, {-1, 0, 0}};  // what `mask_row` has read
};

}  // namespace
}  // namespace fastln
