//! The structure of the parameters, and of whatever there is one of for each: gradients, moments, names.

use std::cell::RefCell;
use std::convert::Infallible;

use temper_kernels::{Device, Part};

/// A dense layer: weight `[outputs, inputs]`, bias `[outputs]`.
#[derive(Debug, Clone)]
pub struct Dense<T, M = T> {
    /// The weight.
    pub weight: M,
    /// The bias, where the family has one.
    pub bias: Option<T>,
    /// What LoRA adds.
    pub adapter: Option<Adapter<T, M>>,
}

/// Low-rank adapters of some parts of a dense layer (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct Adapter<T, M = T> {
    /// The columns of the layer's output that each part makes, its rank and scale.
    pub parts: Vec<Part>,
    /// `[Σ rank, inputs]`, one part's below the other's.
    pub a: M,
    /// `[columns, rank]` of each part.
    pub b: Vec<M>,
    /// DoRA's magnitude of each adapted column, and the norm that it stands in for.
    pub magnitude: Option<[T; 2]>,
}

/// A norm: gain and bias `[width]`.
#[derive(Debug, Clone)]
pub struct Norm<T> {
    /// The gain.
    pub gain: T,
    /// The bias of a LayerNorm.
    pub bias: Option<T>,
}

/// One block.
#[derive(Debug, Clone)]
pub struct Block<T, M = T> {
    /// Before attention.
    pub attention_norm: Norm<T>,
    /// q, k and v in one: `[A, C]`.
    pub qkv: Dense<T, M>,
    /// Norms of the heads of q and of k, `[head_width]` (Qwen3, Gemma 3).
    pub head_norms: Option<[T; 2]>,
    /// `[C, heads · head_width]`.
    pub output: Dense<T, M>,
    /// Of what attention adds to the stream (Gemma).
    pub output_norm: Option<Norm<T>>,
    /// Before the MLP.
    pub mlp_norm: Norm<T>,
    /// Gate and up in one: `[2F, C]`; `[F, C]` for GPT-2.
    pub up: Dense<T, M>,
    /// `[C, F]`.
    pub down: Dense<T, M>,
    /// Of what the MLP adds to the stream (Gemma).
    pub down_norm: Option<Norm<T>>,
}

/// Something for each parameter: its value, its gradient, its description. Vectors and matrices may take
/// different forms: `T` and `M`.
#[derive(Debug, Clone)]
pub struct Weights<T, M = T> {
    /// `[V, C]`.
    pub embedding: M,
    /// `[context, C]`, learned positions.
    pub positions: Option<M>,
    /// The blocks.
    pub blocks: Vec<Block<T, M>>,
    /// Before the head.
    pub norm: Norm<T>,
    /// `[V, C]`; none when it is the embedding.
    pub head: Option<M>,
}

/// One of [`Weights`].
#[derive(Debug, Clone, Copy)]
pub enum Parameter<T, M = T> {
    /// A gain or a bias.
    Vector(T),
    /// Anything with rows and columns.
    Matrix(M),
}

impl<T> Parameter<T> {
    fn either(self) -> T {
        let (Parameter::Vector(x) | Parameter::Matrix(x)) = self;
        x
    }
}

impl<T, M> Weights<T, M> {
    /// The same structure with `vector` of each vector and `matrix` of each matrix, in the order of
    /// [`Weights::parameters`].
    pub fn map_each<'a, U, N>(
        &'a self,
        vector: impl Fn(&'a T) -> U,
        matrix: impl Fn(&'a M) -> N,
    ) -> Weights<U, N> {
        let Ok(all) = self.try_map_each(|x| Ok::<_, Infallible>(vector(x)), |x| Ok(matrix(x)));
        all
    }

    /// The same, up to the first failure.
    ///
    /// # Errors
    /// The first that `vector` or `matrix` gives.
    pub fn try_map_each<'a, U, N, E>(
        &'a self,
        vector: impl Fn(&'a T) -> Result<U, E>,
        matrix: impl Fn(&'a M) -> Result<N, E>,
    ) -> Result<Weights<U, N>, E> {
        let blocks = self.blocks.iter().map(|block| block.try_map_each(&vector, &matrix));
        Ok(Weights {
            embedding: matrix(&self.embedding)?,
            positions: self.positions.as_ref().map(&matrix).transpose()?,
            blocks: blocks.collect::<Result<_, E>>()?,
            norm: self.norm.try_map(&vector)?,
            head: self.head.as_ref().map(&matrix).transpose()?,
        })
    }

    /// What is at both ends of the blocks.
    pub fn without_blocks(&self) -> Weights<T, M>
    where
        T: Clone,
        M: Clone,
    {
        Weights {
            embedding: self.embedding.clone(),
            positions: self.positions.clone(),
            blocks: Vec::new(),
            norm: self.norm.clone(),
            head: self.head.clone(),
        }
    }

    /// Every parameter, from the embedding to the head.
    pub fn parameters(&self) -> Vec<Parameter<&T, &M>> {
        let all = RefCell::new(Vec::new());
        self.map_each(
            |x| all.borrow_mut().push(Parameter::Vector(x)),
            |x| all.borrow_mut().push(Parameter::Matrix(x)),
        );
        all.into_inner()
    }

    /// Every parameter to change, in the same order.
    pub fn parameters_mut(&mut self) -> Vec<Parameter<&mut T, &mut M>> {
        let mut all = vec![Parameter::Matrix(&mut self.embedding)];
        all.extend(self.positions.as_mut().map(Parameter::Matrix));
        self.blocks.iter_mut().for_each(|block| block.push_parameters(&mut all));
        all.extend(self.norm.parameters_mut());
        all.extend(self.head.as_mut().map(Parameter::Matrix));
        all
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.blocks.len() + 1
    }

    /// The parameters of a unit to change: of a block, or, after the last block, of both ends: the embedding, the last norm
    /// and the head.
    pub fn unit_mut(&mut self, unit: usize) -> Vec<Parameter<&mut T, &mut M>> {
        let mut all = Vec::new();
        match self.blocks.get_mut(unit) {
            Some(block) => block.push_parameters(&mut all),
            None => {
                all.push(Parameter::Matrix(&mut self.embedding));
                all.extend(self.positions.as_mut().map(Parameter::Matrix));
                all.extend(self.norm.parameters_mut());
                all.extend(self.head.as_mut().map(Parameter::Matrix));
            }
        }
        all
    }

    /// The head's weight.
    pub fn head(&self) -> &M {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The head's weight, to change.
    pub fn head_mut(&mut self) -> &mut M {
        self.head.as_mut().unwrap_or(&mut self.embedding)
    }
}

impl<T> Norm<T> {
    fn try_map<'a, U, E>(&'a self, vector: &impl Fn(&'a T) -> Result<U, E>) -> Result<Norm<U>, E> {
        Ok(Norm { gain: vector(&self.gain)?, bias: self.bias.as_ref().map(vector).transpose()? })
    }

    fn parameters_mut<M>(&mut self) -> impl Iterator<Item = Parameter<&mut T, M>> {
        [Some(&mut self.gain), self.bias.as_mut()].into_iter().flatten().map(Parameter::Vector)
    }
}

impl<T, M> Block<T, M> {
    /// The same structure with `vector` of each vector and `matrix` of each matrix, in the order of the forward pass.
    pub fn map_each<'a, U, N>(
        &'a self,
        vector: &impl Fn(&'a T) -> U,
        matrix: &impl Fn(&'a M) -> N,
    ) -> Block<U, N> {
        let Ok(block) = self.try_map_each(&|x| Ok::<_, Infallible>(vector(x)), &|x| Ok(matrix(x)));
        block
    }

    /// The same, up to the first failure.
    fn try_map_each<'a, U, N, E>(
        &'a self,
        vector: &impl Fn(&'a T) -> Result<U, E>,
        matrix: &impl Fn(&'a M) -> Result<N, E>,
    ) -> Result<Block<U, N>, E> {
        let pair = |[x, y]: &'a [T; 2]| -> Result<[U; 2], E> { Ok([vector(x)?, vector(y)?]) };
        let dense = |dense: &'a Dense<T, M>| -> Result<Dense<U, N>, E> {
            let weight = matrix(&dense.weight)?;
            let bias = dense.bias.as_ref().map(vector).transpose()?;
            let adapter = dense.adapter.as_ref().map(|adapter| -> Result<Adapter<U, N>, E> {
                Ok(Adapter {
                    parts: adapter.parts.clone(),
                    a: matrix(&adapter.a)?,
                    b: adapter.b.iter().map(matrix).collect::<Result<_, E>>()?,
                    magnitude: adapter.magnitude.as_ref().map(pair).transpose()?,
                })
            });
            Ok(Dense { weight, bias, adapter: adapter.transpose()? })
        };
        Ok(Block {
            attention_norm: self.attention_norm.try_map(vector)?,
            qkv: dense(&self.qkv)?,
            head_norms: self.head_norms.as_ref().map(pair).transpose()?,
            output: dense(&self.output)?,
            output_norm: self.output_norm.as_ref().map(|norm| norm.try_map(vector)).transpose()?,
            mlp_norm: self.mlp_norm.try_map(vector)?,
            up: dense(&self.up)?,
            down: dense(&self.down)?,
            down_norm: self.down_norm.as_ref().map(|norm| norm.try_map(vector)).transpose()?,
        })
    }

    /// Every parameter to change, in the order of the forward pass.
    fn push_parameters<'a>(&'a mut self, all: &mut Vec<Parameter<&'a mut T, &'a mut M>>) {
        use Parameter::{Matrix, Vector};
        fn dense<'a, T, M>(all: &mut Vec<Parameter<&'a mut T, &'a mut M>>, dense: &'a mut Dense<T, M>) {
            all.push(Matrix(&mut dense.weight));
            all.extend(dense.bias.as_mut().map(Vector));
            if let Some(adapter) = &mut dense.adapter {
                all.push(Matrix(&mut adapter.a));
                all.extend(adapter.b.iter_mut().map(Matrix));
                all.extend(adapter.magnitude.iter_mut().flatten().map(Vector));
            }
        }
        all.extend(self.attention_norm.parameters_mut());
        dense(all, &mut self.qkv);
        all.extend(self.head_norms.iter_mut().flatten().map(Vector));
        dense(all, &mut self.output);
        all.extend(self.output_norm.iter_mut().flat_map(Norm::parameters_mut));
        all.extend(self.mlp_norm.parameters_mut());
        dense(all, &mut self.up);
        dense(all, &mut self.down);
        all.extend(self.down_norm.iter_mut().flat_map(Norm::parameters_mut));
    }

    /// Its dense layers, in the order of the forward pass.
    pub fn dense_mut(&mut self) -> [&mut Dense<T, M>; 4] {
        [&mut self.qkv, &mut self.output, &mut self.up, &mut self.down]
    }
}

impl<T> Weights<T> {
    /// The same structure with `f` of each element, in the order of [`Weights::iter`].
    pub fn map<'a, U>(&'a self, f: impl FnMut(&'a T) -> U) -> Weights<U> {
        let f = RefCell::new(f);
        self.map_each(|x| f.borrow_mut()(x), |x| f.borrow_mut()(x))
    }

    /// Every element of a unit, see [`Weights::unit_mut`].
    pub fn unit(&self, unit: usize) -> Vec<&T> {
        let all = RefCell::new(Vec::new());
        let push = |x| all.borrow_mut().push(x);
        match self.blocks.get(unit) {
            Some(block) => _ = block.map_each(&push, &push),
            None => {
                push(&self.embedding);
                self.positions.iter().for_each(push);
                push(&self.norm.gain);
                self.norm.bias.iter().for_each(push);
                self.head.iter().for_each(push);
            }
        }
        all.into_inner()
    }

    /// The same to change.
    pub fn elements_mut(&mut self, unit: usize) -> Vec<&mut T> {
        self.unit_mut(unit).into_iter().map(Parameter::either).collect()
    }

    /// Every element, from the embedding to the head.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.parameters().into_iter().map(Parameter::either)
    }

    /// Every element to change, in the same order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.parameters_mut().into_iter().map(Parameter::either)
    }
}

/// The parameters of a model on a device.
pub type Parameters<D> = Weights<<D as Device>::Buffer, <D as Device>::Weight>;

/// A block on a device.
pub type BlockOn<D> = Block<<D as Device>::Buffer, <D as Device>::Weight>;

/// A dense layer on a device.
pub type DenseOn<D> = Dense<<D as Device>::Buffer, <D as Device>::Weight>;

/// A dense layer's adapters on a device.
pub type AdapterOn<D> = Adapter<<D as Device>::Buffer, <D as Device>::Weight>;
