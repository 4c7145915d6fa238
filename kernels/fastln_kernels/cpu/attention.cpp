// Softmax attention for CPUs, forward and backward; fastln_kernels.reference_attention defines it. It processes one
// block of queries with one block of keys at a time, and a thread holds the scores of only one such block. Matrix
// products use torch's function for blocks in the cache (products.h), which sums in float32. Everything between them is
// fused here. A thread takes one head, or in the backward one head of keys with its group of query heads. Each works in
// a fixed order, so the result does not depend on the number of threads.

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

  // Turns the products of row `left` with the right rows from `right` on into scores: applies scale and mask, and sets
  // hidden keys to -infinity. Returns the largest score.
  float finish_row(float* scores, const Dots<T, R>& dots, int64_t left, int64_t right, int64_t query, int64_t first,
                   int64_t n_cols) const {
    const float* mask = mask_row(query, first, n_cols);
    const int64_t n_seen = std::min(n_cols, (a_.causal ? std::min(a_.keys, query + 1) : a_.keys) - first);
    const int64_t seen = query < a_.queries ? std::max<int64_t>(n_seen, 0) : 0;
    Float top = broadcast(-INFINITE);
    const float scale = static_cast<float>(a_.scale), factor = seen ? dots.factor(left) : 0;
    for (int64_t column = 0; column < seen; column += LANES) {
      Float score = dots.value(scores + column, right + column, factor) * scale;
      if (mask) score += load(mask + column, AllLanes{});
      if (column + LANES > seen) {
        const Float lane = lane_numbers() + static_cast<float>(column);
        score = select(lane < broadcast(static_cast<float>(seen)), score, broadcast(-INFINITE));
      }
      store(scores + column, score, AllLanes{});
      top = maximum(score, top);
    }
    std::fill(scores + std::min(n_cols, round_up(seen, LANES)), scores + n_cols, -INFINITE);
    return largest(top);
  }

  const uint16_t* numbers(int64_t query, int64_t first, int64_t n_cols, int place) const {
    if (!dropout_.active()) return nullptr;
    return dropout_.draw((batch_ * a_.heads + head_) * a_.queries + query, n_cols, place, first);
  }

  void forward(HeadRounding& rounding) const {
    thread_local Buffer<C> value_buffer, probability_buffer;
    thread_local Buffer<float> score_buffer, sum_buffer;
    thread_local Dots<T, R> dots;
    const int64_t dim = round_up(a_.dim, 2 * PAD), v_dim = round_up(a_.v_dim, 2 * PAD);
    const int64_t n_blocks = (a_.keys + block_keys_ - 1) / block_keys_, kv_head = head_ / (a_.heads / a_.kv_heads);
    dots.resize(QUERIES, n_blocks * block_keys_, block_keys_, a_.dim, dim);
    dots.centre(a_.k.at<const T>(batch_, kv_head, 0), a_.k.row, a_.keys);
    C* values = value_buffer.at_least(n_blocks * block_keys_ * v_dim);
    C* p = probability_buffer.at_least(QUERIES * block_keys_);
    float* scores = score_buffer.at_least(QUERIES * block_keys_);
    float* out = sum_buffer.at_least(QUERIES * v_dim);
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
        for (int64_t row = n_queries; row < padded(n_queries); row++)
          std::memset(static_cast<void*>(p + row * block_keys_), 0, n_cols * sizeof(C));
        for (int64_t row = 0; row < n_queries; row++) {
          float* row_scores = scores + row * block_keys_;
          float new_top = finish_row(row_scores, dots, row, first, first_query + row, first, n_cols);
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
  const float* mask_row(int64_t query, int64_t first, int64_t n_cols) const {
    if (!a_.mask.data || query >= a_.queries) return nullptr;
    thread_local Buffer<float> buffer;
    float* to = buffer.at_least(block_keys_);
    n_cols = std::min(n_cols, a_.keys - first);
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

  const Arguments& a_;
  const Dropout& dropout_;
  const int64_t batch_, head_, block_keys_ = keys_of_a_block(a_.keys);
};

struct GradientRoundings {
  HeadRounding dq, dk, dv;
};

// One head of keys and values, with the query heads that use it.
template <class T, class C, class R>
class Gradients {
 public:
  Gradients(const Arguments& arguments, const Dropout& dropout, int64_t batch, int64_t kv_head)
      : a_(arguments), dropout_(dropout), batch_(batch), kv_head_(kv_head) {}

  void run(GradientRoundings& roundings) {
    const bool need_ds = a_.dq.data || a_.dk.data;
    thread_local Buffer<C> key_buffer;
    thread_local Buffer<float> dk_buffer, dv_buffer;
    C* keys = key_buffer.at_least(block_keys_ * dim_);
    float *dk = dk_buffer.at_least(block_keys_ * dim_), *dv = dv_buffer.at_least(block_keys_ * v_dim_);
    const auto rows = [&](const Rows& tensor, int64_t row) { return tensor.at<const T>(batch_, kv_head_, row); };
    scores_.resize(group_ * padded_queries_, block_keys_, block_keys_, a_.dim, dim_);
    slopes_.resize(group_ * padded_queries_, block_keys_, block_keys_, a_.v_dim, v_dim_);
    scores_.centre(rows(a_.k, 0), a_.k.row, a_.keys);
    if (need_ds) slopes_.centre(rows(a_.v, 0), a_.v.row, a_.keys);
    read_queries();
    for (int64_t first = 0; first < a_.keys; first += block_keys_) {
      const int64_t n_keys = std::min(block_keys_, a_.keys - first);
      if (need_ds) slopes_.put_right(rows(a_.v, first), a_.v.row, n_keys, 0);
      scores_.put_right(rows(a_.k, first), a_.k.row, n_keys, 0);
      // The rows of dS sum to 0, so that dq does not depend on the keys' mean; without it, rounding counts less.
      if (a_.dq.data) scores_.pair_right(rows(a_.k, first), a_.k.row, n_keys, keys);
      // The first block of queries writes all columns, unless the mask is causal.
      if (a_.causal) {
        std::fill_n(dk, block_keys_ * dim_, 0.0f);
        std::fill_n(dv, block_keys_ * v_dim_, 0.0f);
      }
      for (int64_t g = 0; g < group_; g++) {
        for (int64_t query = a_.causal ? first / QUERIES * QUERIES : 0; query < a_.queries; query += QUERIES)
          block(g, query, first, keys, dk, dv);
      }
      const auto write = [&](const float* sum, int64_t n_cols, float factor, const Rows& to) {
        store_transposed(sum, block_keys_, n_keys, n_cols, factor, to.at<T>(batch_, kv_head_, first), to.row);
      };
      if (a_.dk.data) write(dk, a_.dim, static_cast<float>(a_.scale), a_.dk);
      if (a_.dv.data) write(dv, a_.v_dim, dropout_.scale(), a_.dv);
      roundings.dk.wrote<T>(batch_, first);
      roundings.dv.wrote<T>(batch_, first);
    }
    for (int64_t first = 0; first < a_.queries && a_.dq.data; first += QUERIES) {
      for (int64_t g = 0; g < group_; g++) write_dq(g, first);
      roundings.dq.wrote<T>(batch_, first);
    }
    release<C>();
  }

 private:
  // Reads the queries and the gradient of the output once, into the layouts that the blocks need.
  void read_queries() {
    thread_local Buffer<C> row_buffer, pair_buffer, q_buffer, dout_buffer;
    thread_local Buffer<float> dq_buffer, delta_buffer, shift_buffer;
    const int64_t n_rows = group_ * padded_queries_, widest = std::max(dim_, v_dim_);
    C *rows = row_buffer.at_least(QUERIES * widest), *pairs = PAIRED<C> ? pair_buffer.at_least(QUERIES * widest) : rows;
    const auto transpose = [&](const T* from, int64_t stride, int64_t n_queries, int64_t n_cols, int64_t ld, C* to) {
      if constexpr (PAIRED<C>) {
        copy_rows(from, stride, n_queries, n_cols, rows, ld);
        transpose_to_pairs(rows, n_queries, ld, pairs, QUERIES);
        split_pairs(pairs, QUERIES, ld, padded(n_queries), to);
      } else {
        transpose_rows(from, stride, n_queries, n_cols, ld, rows, to, QUERIES);
      }
    };
    q_t_ = q_buffer.at_least(n_rows * dim_);
    dout_t_ = dout_buffer.at_least(n_rows * v_dim_);
    dq_ = dq_buffer.at_least(n_rows * dim_);
    delta_ = delta_buffer.at_least(n_rows);
    shift_ = shift_buffer.at_least(n_rows);
    std::fill_n(delta_, n_rows, 0.0f);
    std::fill_n(shift_, n_rows, 0.0f);
    for (int64_t g = 0; g < group_; g++) {
      const int64_t head = kv_head_ * group_ + g;
      for (int64_t query = 0; query < a_.queries; query += QUERIES) {
        const int64_t n_queries = std::min(QUERIES, a_.queries - query), row = g * padded_queries_ + query;
        const T *q = a_.q.at<const T>(batch_, head, query), *dout = a_.dout.at<const T>(batch_, head, query);
        scores_.put_left(q, a_.q.row, n_queries, row);
        if (a_.dk.data) transpose(q, a_.q.row, n_queries, a_.dim, dim_, q_t_ + row * dim_);
        if (a_.dv.data) transpose(dout, a_.dout.row, n_queries, a_.v_dim, v_dim_, dout_t_ + row * v_dim_);
        if (!a_.dq.data && !a_.dk.data) continue;
        slopes_.put_left(dout, a_.dout.row, n_queries, row);
        const T* out = a_.out.at<const T>(batch_, head, query);
        for (int64_t r = row; r < row + n_queries; r++, out += a_.out.row) {
          prefetch_row(out + AHEAD * a_.out.row, a_.v_dim);
          const LeftProducts sums = slopes_.products_with(r, out);
          delta_[r] = sums.with_row, shift_[r] = sums.with_mean;
        }
      }
    }
  }

  // Adds the contribution of one block of queries and one block of keys to the gradients.
  void block(int64_t g, int64_t query, int64_t first, const C* keys, float* dk, float* dv) {
    thread_local Buffer<float> score_buffer, dp_buffer;
    thread_local Buffer<C> p_buffer, ds_buffer, ds_pair_buffer;
    float *scores = score_buffer.at_least(QUERIES * block_keys_), *dp = dp_buffer.at_least(QUERIES * block_keys_);
    C *p = p_buffer.at_least(QUERIES * block_keys_), *ds = ds_buffer.at_least(QUERIES * block_keys_);
    C* ds_pairs = PAIRED<C> ? ds_pair_buffer.at_least(QUERIES * block_keys_) : ds;
    const Head<T, C, R> head(a_, dropout_, batch_, kv_head_ * group_ + g);
    const int64_t n_queries = std::min(QUERIES, a_.queries - query), n_rows = padded(n_queries);
    const int64_t n_cols = padded(head.visible(query, n_queries, first)), row = g * padded_queries_ + query;
    if (!n_cols) return;
    const bool need_ds = a_.dq.data || a_.dk.data, add = a_.causal || row;  // to the sums over queries
    scores_.multiply(n_rows, n_cols, row, 0, scores);
    if (need_ds) slopes_.multiply(n_rows, n_cols, row, 0, dp);
    const float* lse = a_.lse + (batch_ * a_.heads + kv_head_ * group_ + g) * a_.queries;
    for (int64_t r = 0; r < n_rows; r += 2) {
      float lses[2], factors[2];
      const uint16_t* numbers[2];
      for (int i = 0; i < 2; i++) {
        head.finish_row(scores + (r + i) * block_keys_, scores_, row + r + i, 0, query + r + i, first, n_cols);
        lses[i] = r + i < n_queries ? lse[query + r + i] : 0;
        if (is_dead_row(lses[i])) lses[i] = revive(scores + (r + i) * block_keys_, n_cols, lses[i]);
        numbers[i] = head.numbers(query + r + i, first, n_cols, i);
        factors[i] = need_ds && r + i < n_queries ? slopes_.factor(row + r + i) : 0;
      }
      for (int64_t column = 0; column < n_cols; column += LANES) {
        Float kept[2], slope[2];
        for (int i = 0; i < 2; i++) {
          const int64_t at = (r + i) * block_keys_ + column;
          const Float probability = exponential_for(load(scores + at, AllLanes{}) - lses[i], T{});
          kept[i] = numbers[i] ? dropout_.keep(probability, numbers[i] + column) : probability;
          if (!need_ds) continue;
          Float dprobability = slopes_.value(dp + at, column, factors[i]);
          if constexpr (std::is_same_v<R, int8_t>) dprobability += shift_[row + r + i];
          slope[i] = kept[i] * dropout_.scale() * dprobability - probability * delta_[row + r + i];
          store(ds + at, slope[i], AllLanes{});
        }
        if (a_.dv.data) store_pair(pair_at(p, block_keys_, r / 2, column), block_keys_, kept[0], kept[1]);
        if (a_.dk.data && PAIRED<C>)
          store_pair(pair_at(ds_pairs, block_keys_, r / 2, column), block_keys_, slope[0], slope[1]);
      }
    }
    if (a_.dv.data)
      multiply(padded(a_.v_dim), n_cols, n_rows, dout_t_ + row * v_dim_, QUERIES, p, block_keys_, dv, block_keys_,
               add);
    if (a_.dk.data)
      multiply(padded(a_.dim), n_cols, n_rows, q_t_ + row * dim_, QUERIES, ds_pairs, block_keys_, dk, block_keys_,
               add);
    if (a_.dq.data)
      multiply(n_rows, padded(a_.dim), n_cols, ds, block_keys_, keys, dim_, dq_ + row * dim_, dim_, first > 0);
  }

  static Dots<T, R>& score_dots() {
    thread_local Dots<T, R> dots;
    return dots;
  }
  static Dots<T, R>& slope_dots() {
    thread_local Dots<T, R> dots;
    return dots;
  }

  // Writes a block of a query head's rows of dq.
  void write_dq(int64_t g, int64_t first) const {
    const float scale = static_cast<float>(a_.scale);
    for (int64_t query = first; query < std::min(first + QUERIES, a_.queries); query++) {
      T* to = a_.dq.at<T>(batch_, kv_head_ * group_ + g, query);
      prefetch_row<T, true>(to + AHEAD * a_.dq.row, a_.dim);
      const float* from = dq_ + (g * padded_queries_ + query) * dim_;
      for_columns(a_.dim, [&](int64_t column, auto lanes) {
        store(to + column, load(from + column, lanes) * scale, lanes);
      });
    }
  }

  const Arguments& a_;
  const Dropout& dropout_;
  const int64_t batch_, kv_head_, group_ = a_.heads / a_.kv_heads, block_keys_ = keys_of_a_block(a_.keys);
  const int64_t dim_ = round_up(a_.dim, 2 * PAD), v_dim_ = round_up(a_.v_dim, 2 * PAD);
  const int64_t padded_queries_ = round_up(a_.queries, QUERIES);
  Dots<T, R>&scores_ = score_dots(), &slopes_ = slope_dots();  // q k^T and do v^T
  C *q_t_, *dout_t_;  // transposed, block by block
  float *dq_, *delta_, *shift_;  // `shift_`: the products of the output's gradients with the values' mean
};

template <class Run>
void with_types(const Arguments& a, Run&& run) {
  const auto with_int8 = [&](auto type, auto compute) {
    if (a.int8) return run(type, compute, int8_t{});
    run(type, compute, compute);
  };
  if (a.compute_dtype == BFLOAT16) return with_int8(bfloat16{}, bfloat16{});
  with_dtype(a.dtype, [&](auto type) { with_int8(type, float{}); });
}

int threads(const Arguments& a) { return useful_threads(a.n_threads, a.batches * a.heads * a.queries * a.keys); }

}  // namespace
}  // namespace fastln

using namespace fastln;

extern "C" {

void fastln_attention_forward(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Dropout dropout(a.threshold, a.seed);
  HeadRounding rounding(a.out_rounding, a.out, a.batches, a.queries, QUERIES, a.heads);
  with_types(a, [&](auto type, auto compute, auto dots) {
    for_blocks(a.batches * a.heads, threads(a), [&](int64_t head) {
      Head<decltype(type), decltype(compute), decltype(dots)>(a, dropout, head / a.heads, head % a.heads)
          .forward(rounding);
    });
  });
}

void fastln_attention_backward(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const Dropout dropout(a.threshold, a.seed);
  const auto rounding = [&](const Rounding* of, const Rows& rows, int64_t n_rows, int64_t block) {
    return HeadRounding(of, rows, a.batches, n_rows, block, a.kv_heads);
  };
  const int64_t block_keys = keys_of_a_block(a.keys);
  GradientRoundings roundings{rounding(a.dq_rounding, a.dq, a.queries, QUERIES),
                              rounding(a.dk_rounding, a.dk, a.keys, block_keys),
                              rounding(a.dv_rounding, a.dv, a.keys, block_keys)};
  with_types(a, [&](auto type, auto compute, auto dots) {
    for_blocks(a.batches * a.kv_heads, threads(a), [&](int64_t head) {
      Gradients<decltype(type), decltype(compute), decltype(dots)>(a, dropout, head / a.kv_heads, head % a.kv_heads)
          .run(roundings);
    });
  });
}

}  // extern "C"
